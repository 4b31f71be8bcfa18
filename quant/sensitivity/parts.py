"""What a long measurement keeps while it runs: every finished part in one file, written whole after
each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from effattn.outputs import check_writable
from effattn.reports.files import finite, write_text_atomic

VERSION = 1


class Parts:
    """Finished parts by name, in memory and, with a path, on disk. A run with the same settings
    goes on from there.

    settings: what the run was asked for; made_with: versions and the machine; job: its command.
    ValueError for a file of others, and for one that is no such file; OSError where it cannot be
    written. All before anything is measured."""

    def __init__(
        self, path: Path | None, settings: dict, made_with: dict, job: str = "quantize-kv"
    ):
        self.path, self.job = path, job
        head = {
            "kind": f"{job}-partial",
            "version": VERSION,
            "settings": settings,
            "made_with": made_with,
        }
        self.head = json.loads(json.dumps(finite(head), default=str))
        self.done: dict[str, object] = {}
        if path is not None:
            check_writable("output", path.parent)
            if path.exists():
                self.done = self._read()

    def _read(self) -> dict[str, object]:
        again = f"delete {self.path} to start over"
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            done = dict(old["parts"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"resume: {self.path} is not an unfinished run of {self.job}; {again}"
            ) from None
        changed = [name for name in ("kind", "version") if old.get(name) != self.head[name]]
        for group in ("settings", "made_with"):
            before = old.get(group) or {}
            changed += [
                name for name in self.head[group] if before.get(name) != self.head[group][name]
            ]
        if changed:
            raise ValueError(
                f"resume: {self.path} holds {len(done)} finished parts of a run with other "
                "settings "
                f"({', '.join(changed)}): repeat them to go on; {again}"
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


def kept(path: Path | None) -> int:
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
        f"stopped; {kept(path)} finished parts are kept in {path}: the same command goes on "
        "from there"
    )
