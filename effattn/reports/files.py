"""Reports on disk: strict JSON, and files that appear whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path

from effattn.locking import open_locked

TEMPORARY = ".effattn-new"
QUALITY = ("perplexity", "cross_entropy", "kl")


def finite(value: object) -> object:
    """`value` with None for every float that JSON has no word for: NaN and the infinities. Tuples
    become lists.
    """
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(data: object) -> object:
    """`data` read back from JSON, with NaN for every null where a model's quality stands: it was
    not finite.
    """
    if isinstance(data, dict):
        return {
            key: math.nan if value is None and key in QUALITY else numbers(value)
            for key, value in data.items()
        }
    return [numbers(one) for one in data] if isinstance(data, list | tuple) else data


def write_all_atomic(folder: Path | str, files: dict[str, str]) -> None:
    """Writes `files` {name: text} into `folder` (made if need be), the last one last.

    Every text is on disk under a temporary name before the first is put in place: a full disk or a
    bad text changes nothing and leaves nothing behind. The temporary file is locked while it is
    written, and what a killed process left of one is written over."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged: list[tuple[int, Path, Path]] = []
    placed = 0
    try:
        for name, text in files.items():
            final = (folder / name).resolve()  # a link stays one
            temporary = final.parent / f".{final.name}{TEMPORARY}"
            staged.append((open_locked(temporary, _opened, wait=True), temporary, final))
            _fill(staged[-1][0], text)
        for _, temporary, final in staged:
            os.replace(temporary, final)
            placed += 1
    finally:
        for _, temporary, _ in staged[placed:]:
            temporary.unlink(missing_ok=True)
        for descriptor, *_ in staged:
            os.close(descriptor)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _fill(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Writes `text` to `path` by a temporary file beside it, fsync and replace."""
    path = Path(path)
    write_all_atomic(path.parent, {path.name: text})
