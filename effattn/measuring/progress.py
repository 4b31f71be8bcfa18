"""What a measurement keeps while it runs: finished cells in one file, written whole after each."""

from __future__ import annotations

import json
from pathlib import Path

from effattn.outputs import check_writable, sweep
from effattn.reports.files import finite, write_text_atomic

KIND, VERSION = "measure-partial", 1
NAME, REPORT = ".measure.partial.json", "report.json"


def partial_in(folder: Path) -> Path:
    """The file of finished cells in an output folder."""
    return folder / NAME


def partial_beside(file: Path) -> Path:
    """The file of finished cells beside a result file that will be written at the end."""
    return file.absolute().parent / f".{file.name}.partial.json"


def check_output(folder: Path, fresh: bool) -> None:
    """ValueError for a folder with a finished report, OSError for one that cannot be written.

    With finished cells beside it, the run was killed before it had removed those: it only has to be
    repeated."""
    check_writable("output", folder)
    if (folder / REPORT).exists() and not fresh and not partial_in(folder).exists():
        sweep(folder)  # the run that wrote it may have been killed at its very end
        raise ValueError(
            f"output: {folder} holds a finished report; --fresh measures again and replaces it"
        )


class Partial:
    """Rows so far, in memory and, with a path, on disk. ValueError when the file is of other
    settings.
    """

    def __init__(self, path: Path | str | None, settings: dict, made_with: dict, fresh: bool):
        self.path = None if path is None else Path(path)
        self.head = json.loads(
            json.dumps(
                finite(
                    {
                        "kind": KIND,
                        "version": VERSION,
                        "settings": settings,
                        "made_with": made_with,
                    }
                )
            )
        )
        self.rows: list[dict] = []
        if self.path is None:
            return
        check_writable("output", self.path.parent)
        if self.path.exists() and not fresh:
            self.rows = self._read()

    def _read(self) -> list[dict]:
        again = "the same command with --fresh starts over"
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            rows = old["rows"]
            cells = [(row["context"], row["batch"]) for row in rows]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"resume: {self.path} is not an unfinished measurement; {again}"
            ) from None
        changed = [
            key
            for part in ("settings", "made_with")
            for key in self.head[part]
            if (old.get(part) or {}).get(key) != self.head[part][key]
        ]
        if (old.get("kind"), old.get("version")) != (KIND, VERSION):
            changed = ["version"]
        if changed:
            raise ValueError(
                f"resume: {self.path} holds {len(set(cells))} finished cells of a run with other "
                "settings "
                f"({', '.join(dict.fromkeys(changed))}): repeat them to go on; {again}"
            )
        return rows

    def has(self, context: int, batch: int) -> bool:
        """Whether that cell is finished."""
        return any((row["context"], row["batch"]) == (context, batch) for row in self.rows)

    @property
    def cells(self) -> int:
        """How many (context, batch) are finished."""
        return len({(row["context"], row["batch"]) for row in self.rows})

    def add(self, rows: list[dict]) -> None:
        """Rows of a finished cell, written to the file at once."""
        self.rows += json.loads(json.dumps(finite(rows)))
        if self.path is not None:
            text = json.dumps(self.head | {"rows": self.rows}, indent=1, allow_nan=False)
            write_text_atomic(self.path, text + "\n")


def discard(path: Path | None) -> None:
    """The run is finished and its results are written: the file of finished cells is no longer
    needed.
    """
    if path is not None:
        path.unlink(missing_ok=True)


def kept_cells(path: Path | None) -> int:
    """How many finished cells a file holds; 0 without one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path else []
        return len({(row["context"], row["batch"]) for row in rows})
    except (OSError, ValueError, KeyError, TypeError):
        return 0
