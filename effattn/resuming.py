"""The newest complete checkpoint of a training: one that was cut off while it was written is not
gone on from.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"  # the Trainer writes it last
PICKLED = ("optimizer.pt", "scheduler.pt")  # what a run needs beside its weights, and random states
ZIPPED = (".pt", ".pth")


def newest_complete(folder: Path, world_size: int = 1, clean: bool = False) -> Path | None:
    """The complete `checkpoint-N` in `folder` with the highest N, None without one; `clean`:
    incomplete ones go.
    """
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        if (named := re.fullmatch(r"checkpoint-(\d+)", entry.name)) and entry.is_dir():
            found[int(named[1])] = entry
    newest = None
    for step, entry in sorted(found.items()):
        if complete(entry, step, world_size):
            newest = entry
        elif clean:
            shutil.rmtree(entry)
    return newest


def complete(checkpoint: Path, step: int, world_size: int = 1) -> bool:
    """Whether everything that the Trainer goes on from is there and can be read to its end."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = [file for file in checkpoint.iterdir() if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    zipped = [file for file in files if file.suffix in ZIPPED]
    wanted = {*PICKLED, *_random_states(world_size)}
    # FSDP and DeepSpeed keep theirs in folders
    if any(entry.is_dir() for entry in checkpoint.iterdir()):
        wanted.discard("optimizer.pt")
    return (
        isinstance(state, dict)
        and state.get("global_step") == step
        and wanted <= {file.name for file in files}
        and _shards(checkpoint) <= {file.name for file in weights}
        and all(map(_tensors_readable, weights))
        and all(map(_zip_readable, zipped))
    )


def _random_states(world_size: int) -> set[str]:
    return (
        {"rng_state.pth"}
        if world_size <= 1
        else {f"rng_state_{rank}.pth" for rank in range(world_size)}
    )


def _shards(checkpoint: Path) -> set[str]:
    """The weight files that there must be: those of the index, or the only one."""
    index = checkpoint / "model.safetensors.index.json"
    if not index.exists():
        names = {file.name for file in checkpoint.glob("*.safetensors")}
        return names or {"model.safetensors"}
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {""}  # which no file is called


def _tensors_readable(file: Path) -> bool:
    """Whether the header fits the file's length: safetensors looks at both when it opens one."""
    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (OSError, SafetensorError):
        return False
    return True


def _zip_readable(file: Path) -> bool:
    """Whether an archive (what torch writes) has its end, and every part its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
