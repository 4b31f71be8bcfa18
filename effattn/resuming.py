"""What an unfinished run goes on from, beside its output until that is whole.

A run that trains keeps a folder `.NAME.partial`: `settings.json`, which says whose it is, and a
folder of the Trainer's checkpoints for each training (`newest_complete` finds the one to go on
from). A run that measures keeps one file `.NAME.partial.json` of its settings and every finished
part (`Parts`). Both refuse to go on from a run with other settings, and both go when the output is
there."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from effattn.outputs import check_writable
from effattn.reports.files import finite, write_text_atomic

SETTINGS = "settings.json"  # in the folder of an unfinished run: what it was asked for
VERSION = 1  # of the files of finished parts
STATE = "trainer_state.json"  # the Trainer writes it last
PICKLED = ("optimizer.pt", "scheduler.pt")  # what a run needs beside its weights, and random states
ZIPPED = (".pt", ".pth")


# A folder: settings, and trainings
# -------------------------------------------------------------------------------------------------


def partial_folder(output: Path | str) -> Path:
    """Beside the folder that a run writes at its end: where what it resumes from lies until
    then.
    """
    target = Path(output).absolute()
    return target.parent / f".{target.name}.partial"


def as_json(settings: Mapping) -> dict:
    """Settings as JSON reads them back; paths are texts."""
    return json.loads(json.dumps(finite(settings), default=str))


def check_settings(folder: Path, settings: dict, write: bool) -> None:
    """Compares `settings`, as JSON reads them, with those of the unfinished run in `folder`;
    without one, writes them if `write`. ValueError if they differ."""
    manifest = folder / SETTINGS
    if manifest.exists():
        try:
            old = dict(json.loads(manifest.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"{manifest} is damaged: delete {folder} to start again") from None
        if changed := sorted(key for key in settings if old.get(key) != settings[key]):
            raise ValueError(
                f"{folder} holds an unfinished run with other settings ({', '.join(changed)}): "
                "repeat them to go on, or delete that folder to start again"
            )
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(manifest, json.dumps(settings, indent=1) + "\n")


def discard(partial: Path, last: str = SETTINGS) -> None:
    """Removes what a run went on from, its settings last: killed meanwhile, it is still known whose
    the rest is.
    """
    if partial.is_dir():
        for entry in partial.iterdir():
            if entry.name != last:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def is_of(partial: Path, settings: dict) -> bool:
    """Whether what lies in `partial`, a folder or a file, was kept by a run with these settings."""
    try:
        file = partial / SETTINGS if partial.is_dir() else partial
        old = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return old.get("settings", old) == settings


# A file: settings, and finished parts
# -------------------------------------------------------------------------------------------------


def partial_file(output: Path | str) -> Path:
    """Beside the file or folder that a run writes at its end: where its finished parts lie until
    then.
    """
    target = Path(output).absolute()
    return target.parent / f".{target.name}.partial.json"


class Parts:
    """Finished parts by name, in memory and, with a path, on disk, where the file is written whole
    after each. A run with the same settings goes on from there.

    settings: what the run was asked for; made_with: versions and the machine; job: its command;
    fresh: what the file holds is forgotten. ValueError for a file of others, and for one that is no
    such file, in the class's words; OSError where it cannot be written. All before anything is
    measured."""

    PARTS = "parts"
    UNFINISHED = "an unfinished run of {job}"
    AGAIN = "delete {path} to start over"

    def __init__(
        self, path: Path | None, settings: dict, made_with: dict, job: str, fresh: bool = False
    ):
        self.path, self.job = path, job
        self.head = as_json(
            {
                "kind": f"{job}-partial",
                "version": VERSION,
                "settings": settings,
                "made_with": made_with,
            }
        )
        self.done: dict[str, object] = {}
        if path is not None:
            check_writable("output", path.parent)
            if path.exists() and not fresh:
                self.done = self._read(path)

    def _read(self, path: Path) -> dict[str, object]:
        again = self.AGAIN.format(path=path)
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            done = dict(old["parts"])
        except (ValueError, KeyError, TypeError):
            unfinished = self.UNFINISHED.format(job=self.job)
            raise ValueError(f"resume: {path} is not {unfinished}; {again}") from None
        changed = [name for name in ("kind", "version") if old.get(name) != self.head[name]]
        for group in ("settings", "made_with"):
            before = old.get(group) or {}
            changed += [
                name for name in self.head[group] if before.get(name) != self.head[group][name]
            ]
        if changed:
            raise ValueError(
                f"resume: {path} holds {len(done)} finished {self.PARTS} of a run with other "
                f"settings ({', '.join(changed)}): repeat them to go on; {again}"
            )
        return done

    def once(self, name: str, make: Callable[[], object]) -> object:
        """The part of that name: what an earlier run kept, or what `make` gives now, as JSON reads
        it back.
        """
        if name not in self.done:
            self.done[name] = json.loads(json.dumps(finite(make())))
            if self.path is not None:
                text = json.dumps(self.head | {"parts": self.done}, indent=1, allow_nan=False)
                write_text_atomic(self.path, text + "\n")
        return self.done[name]

    def discard(self) -> None:
        """The run is finished and its results are written: the file is no longer needed."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def kept_parts(path: Path | None) -> int:
    """How many finished parts a file holds; 0 without one."""
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["parts"]) if path else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def what_is_kept(path: Path | None) -> str:
    """One line for who stops a run whose finished parts go into `path`."""
    if path is None:
        return "stopped; nothing is kept: with --output it would be"
    return (
        f"stopped; {kept_parts(path)} finished parts are kept in {path}: the same command goes on "
        "from there"
    )


# A training: its newest checkpoint
# -------------------------------------------------------------------------------------------------


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
