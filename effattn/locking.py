"""Locks that no dead process holds: the kernel gives them back with the process, however it
ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: outputs are then not guarded against a second run
    fcntl = None

# What file systems without such locks answer (NFS knows none on folders).
WITHOUT = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF}
ATTEMPTS = 100  # to open what is made and gone again


class Busy(OSError):
    """Another process, or another thread, holds the lock."""


def take(descriptor: int, wait: bool) -> bool:
    """Locks an open file or folder; False where there are no locks. Busy when another holds it and
    we do not wait.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(str(error)) from None
    except OSError as error:
        if error.errno in WITHOUT:
            return False
        raise
    return True


def open_locked(path: Path, opened: Callable[[Path], int], wait: bool = False) -> int:
    """A descriptor of `path`, locked. `opened` opens it, and makes it if need be.

    Who held the lock before may have renamed or removed what was opened: then it is opened again.
    """
    missed = 0
    while True:
        try:
            descriptor = opened(path)
        except FileNotFoundError:
            missed += 1
            # made, and gone before it was opened; or nothing can be made there, as in /proc
            if missed >= ATTEMPTS or not path.parent.is_dir():
                raise
            continue
        try:
            take(descriptor, wait)
            if still_there(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def still_there(descriptor: int, path: Path) -> bool:
    """Whether `path` is what was opened."""
    try:
        now = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), now)
