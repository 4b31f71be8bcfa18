"""Where results go: folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from effattn.permissions import follow_umask


def check_new_folder(argument: str, path: str | Path) -> None:
    """ValueError when `path` exists and is not an empty folder."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{argument}: {str(path)!r} exists and is not an empty folder; nothing was written")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; renames it to `path` at the end, or removes it when the body fails.

    ValueError when `path` exists and is not an empty folder.
    """
    check_new_folder("path", path)
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        follow_umask(folder)
        for file in [*folder.rglob("*"), folder]:
            _fsync(file)
        os.replace(folder, target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
