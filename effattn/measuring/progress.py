"""Where a measurement keeps its finished cells while it runs: a file in its output folder, or
beside the first of its files.
"""

from __future__ import annotations

from pathlib import Path

from effattn.outputs import check_writable, sweep
from effattn.resuming import Parts

NAME, REPORT = ".measure.partial.json", "report.json"


def partial_in(folder: Path) -> Path:
    """The file of finished cells in an output folder."""
    return folder / NAME


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


class Cells(Parts):
    """The rows of every finished (context, batch), by `cell`."""

    PARTS = "cells"
    UNFINISHED = "an unfinished measurement"
    AGAIN = "the same command with --fresh starts over"

    def __init__(self, path: Path | str | None, settings: dict, made_with: dict, fresh: bool):
        path = None if path is None else Path(path)
        super().__init__(path, settings, made_with, "measure", fresh)

    @property
    def rows(self) -> list[dict]:
        """Those of all finished cells, in the order in which they were measured."""
        return [row for rows in self.done.values() for row in rows]


def cell(context: int, batch: int) -> str:
    """The name of a part."""
    return f"{context} x {batch}"
