"""Who may read what is written: the files of safetensors and tempfile are private, ours are as any
program's.
"""

from __future__ import annotations

import os
from pathlib import Path


def follow_umask(folder: Path) -> None:
    """Gives a folder and everything in it the permissions that new files and folders get. Links are
    left alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
