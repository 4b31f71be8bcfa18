"""Reports on disk: strict JSON, and files that appear whole or not at all."""

from __future__ import annotations

import math
import os
import uuid
from pathlib import Path


def finite(value: object) -> object:
    """`value` with None for every float that JSON has no word for: NaN and the infinities. Tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_all_atomic(folder: Path | str, files: dict[str, str]) -> None:
    """Writes `files` {name: text} into `folder` (made if need be), the last one last.

    Every text is on disk under a temporary name before the first is put in place: a full disk or a bad text
    changes nothing and leaves nothing behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged: list[tuple[Path, Path]] = []
    try:
        for name, text in files.items():
            temporary = folder / f".{name}.{uuid.uuid4().hex}.tmp"
            staged.append((temporary, folder / name))
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in staged:
            os.replace(temporary, final)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Writes `text` to `path` by a temporary file beside it, fsync and replace."""
    path = Path(path)
    write_all_atomic(path.parent, {path.name: text})
