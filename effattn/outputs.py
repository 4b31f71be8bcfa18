"""Where results go: checked before any work, held by one run at a time, and there whole or not at
all.

    check_new_folder("output", path)        # what can be known to be wrong, in one line
    with claim("output", path):             # for the length of a run: nobody else writes there
        ...
        with atomic_folder(path) as folder: # what lies in `folder` at the end becomes `path`
            ...

A run works in `.NAME.effattn-tmp` beside its output. The folder is locked, is renamed to the output
in the end, and is removed when the run fails or is stopped. What a killed run leaves of it is used,
emptied, by the next one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from effattn.locking import Busy, open_locked, still_there, take
from effattn.permissions import follow_umask

STAGING = ".effattn-tmp"
OWNER = ".owner"  # in the staging folder, until it is filled: who works there
# the most that a name beside the output has more than the output's own
LONGEST = len("..partial.json")

# what a file system answers that gives no file a second name
NO_LINKS = (
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EMLINK,
    errno.EXDEV,
    errno.ENOSYS,
)

_claims: dict[Path, int] = {}  # target -> the thread that holds it
_filling: set[Path] = set()  # staging folders that become their outputs as they are


# Checks
# -------------------------------------------------------------------------------------------------


def check_new_folder(argument: str, path: str | Path) -> None:
    """ValueError when `path` exists and is not an empty folder, or is no name for one; OSError when
    nothing can be written there. Changes nothing on the disk."""
    with _named(argument, path):
        target = _check_name(argument, path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(
                f"{argument}: {str(path)!r} exists and is not an empty folder; nothing was written"
            )
        if os.path.ismount(target):
            raise ValueError(
                f"{argument}: {str(path)!r} is a mount point, valid is a new folder in it"
            )
        _check_parents(argument, target)


def check_file(argument: str, path: str | Path) -> None:
    """ValueError when `path` is no name for a file, OSError when it cannot be written. Changes
    nothing on the disk.
    """
    with _named(argument, path):
        target = _check_name(argument, path)
        if target.is_dir():
            raise ValueError(f"{argument}: {path} is a folder, valid is a file's name")
        _check_parents(argument, target)


def check_writable(argument: str, folder: Path) -> None:
    """Makes the folder if need be. OSError that names the argument when nothing can be written
    there.
    """
    _check_name(argument, folder)
    with _named(argument, folder, "nothing was measured"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()


def check_room(argument: str, path: str | Path, needed: int) -> None:
    """OSError when the disk of `path` has less than `needed` bytes free: the least that will be
    written.
    """
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"{argument}: {path} needs {needed:,} bytes, the disk has {free:,} free; nothing was "
            "done"
        )


@contextlib.contextmanager
def _named(argument: str, path: str | Path, done: str = "nothing was done") -> Iterator[None]:
    """What the system says of a path becomes one line that names the argument."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # our own words already
            raise
        reason = error.strerror or str(error)
        raise OSError(f"{argument}: {path} cannot be written ({reason}); {done}") from None


def _check_name(argument: str, path: str | Path) -> Path:
    """The absolute path that is meant. ValueError for "~", for links to nothing, and for what no
    file can be called.
    """
    text = str(path)
    if "\0" in text:
        raise ValueError(f"{argument}: got {text!r}, a path has no zero bytes")
    if text.startswith("~"):
        meant = os.path.expanduser(text)
        raise ValueError(
            f"{argument}: got {text!r}, only the shell expands '~' (unquoted); valid is {meant!r}"
        )
    target = Path(path).absolute()
    with _named(argument, path):
        if target.is_symlink():
            if not target.exists():
                raise ValueError(
                    f"{argument}: {text!r} is a link to {os.readlink(target)!r}, which does not "
                    "exist"
                )
            target = target.resolve()
    return target


def _check_parents(argument: str, target: Path) -> None:
    """ValueError or OSError unless a file or folder `target` can be made, with the folders above
    it.
    """
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        what = (
            "a link to nothing" if parent.is_symlink() and not parent.exists() else "not a folder"
        )
        raise ValueError(f"{argument}: {target} cannot be written, {parent} is {what}")
    limit = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for part in target.parts[len(parent.parts) :]:
        if len(os.fsencode(part)) > limit - LONGEST:
            raise ValueError(
                f"{argument}: the name {part[:24]!r}... has {len(os.fsencode(part))} bytes, valid "
                f"is at most {limit - LONGEST}"
            )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(
            f"{argument}: {target} cannot be written (no permission in {parent}); nothing was done"
        )


# One run at a time
# -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim(argument: str, path: str | Path) -> Iterator[Path]:
    """Holds the output `path` while the body runs; yields its staging folder. Within another claim
    of this thread on the same path it is that one.

    OSError when another process holds it, which names that, and when nothing can be written there.
    """
    target, me = _check_name(argument, path), threading.get_ident()
    staging = target.parent / f".{target.name}{STAGING}"
    if _claims.get(target) == me:
        yield staging
        return
    with _named(argument, path):
        made = _make_parents(target)
        try:
            descriptor = _open(argument, path, staging)
        except BaseException:
            sweep(target)  # made, and stopped before it was ours
            _remove_empty(made)
            raise
    _claims[target] = me
    try:
        with _named(argument, path):
            _empty(staging)  # a dead run's leftovers
            (staging / OWNER).write_text(str(os.getpid()), encoding="utf-8")
        yield staging
    finally:
        del _claims[target]
        try:
            # not renamed; what has the name now may be another run's
            if still_there(descriptor, staging):
                _remove(staging)
        finally:
            os.close(descriptor)
            _remove_empty(made)


def sweep(path: str | Path) -> None:
    """Removes what a dead run has left beside the output `path`; what a living one works in is left
    alone.
    """
    target = Path(path).absolute()
    staging = target.parent / f".{target.name}{STAGING}"
    try:
        descriptor = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # nothing there
        return
    try:
        if take(descriptor, wait=False) and still_there(descriptor, staging):
            _remove(staging)
    except Busy:
        pass
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claim_all(targets: Mapping[str, str | Path | None]) -> Iterator[None]:
    """`claim` of every {argument: path} that is not None."""
    with contextlib.ExitStack() as held:
        for argument, path in targets.items():
            if path is not None:
                held.enter_context(claim(argument, path))
        yield


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; renames it to `path` at the end, or removes it when
    the body fails.

    Within another atomic folder it is that one: what is whole there is whole here. Raises what
    `check_new_folder` and `claim` do."""
    check_new_folder("path", path)
    target = _check_name("path", path)
    if target in _filling:
        yield target
        return
    with claim("path", path) as folder:
        _empty(folder)
        _filling.add(folder)
        try:
            yield folder
            follow_umask(folder)
            for file in [*folder.rglob("*"), folder]:
                fsync(file)
            os.replace(folder, target)
            fsync(target.parent)
        except BaseException:
            if folder.is_dir():
                _empty(folder)
            raise
        finally:
            _filling.discard(folder)


def fsync(path: Path) -> None:
    """Has a file or a folder's entries reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(file: Path, other: Path) -> None:
    """A second name of a file, which takes no room; a copy where the file system has only one. The
    first one stays: a run that is killed before its output has its name goes on from there."""
    try:
        os.link(file, other)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(file, other)


def _open(argument: str, path: str | Path, staging: Path) -> int:
    """The staging folder's descriptor, locked. Busy, in words, when another run has it."""

    def opened(folder: Path) -> int:
        folder.mkdir(exist_ok=True)
        return os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)

    try:
        return open_locked(staging, opened)
    except Busy:
        raise Busy(
            f"{argument}: {path} is being written by {_owner(staging)}; wait for it, or name "
            "another"
        ) from None


def _owner(staging: Path) -> str:
    try:
        return f"process {int((staging / OWNER).read_text(encoding='utf-8'))}"
    except (OSError, ValueError):  # it saves already
        return "another process"


def _remove(folder: Path) -> None:
    """The folder and all in it, also when a signal comes in the middle of that."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _make_parents(target: Path) -> list[Path]:
    """Makes the folders above `target`; returns those that were not there, the innermost first."""
    missing = []
    parent = target.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: something was written, by us or by others
        for folder in folders:
            folder.rmdir()
