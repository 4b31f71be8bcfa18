"""The tables of reports, and how their numbers are written: what is unknown says "not measured".

A `Table` renders to HTML (through the page's template), Markdown and the terminal, so that all
three say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = "not measured"


@dataclass
class Table:
    """Cells are ready-made text; the first column is text, the others are numbers (right-aligned).

    On the page a click on a header sorts: by the number that a cell starts with and its unit ("1.2
    MiB", "4,096", "9.2x", "12.3 ms"), what was not measured last."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False  # HTML: behind a <details> line
    facts: bool = (
        False  # names and values of all kinds: left-aligned on the page, in the order given
    )

    def markdown(self) -> str:
        """The title, the table and its note."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        body = "\n".join(
            f"| {' | '.join(markdown_text(cell) for cell in line)} |" for line in lines
        )
        return f"**{markdown_text(self.title)}**\n\n{body}" + (
            f"\n\n{markdown_text(self.note)}" if self.note else ""
        )

    def rich(self):
        """The same for a terminal: a `rich.table.Table`."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, style="bold"), caption=Text(self.note) if self.note else None
        )
        table.title_justify = table.caption_justify = "left"
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def markdown_text(text: str) -> str:
    """`text` as it is in a Markdown table cell: no cell ends, no HTML, one line."""
    return " ".join(str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").split())


def number(value: object) -> str:
    """A number as a person reads it; None is "not measured", other things are their text."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    return (
        f"{value:.2e}"
        if size >= 1e6 or size < 1e-3
        else f"{value:,.1f}"
        if size >= 100
        else f"{value:.4f}"
    )


def data_size(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    if count is None:
        return UNKNOWN
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count:,.0f} B"


def percent(before: float | None, after: float | None) -> str:
    """The change as " (+5.5 %)", or nothing where one of the two is unknown."""
    return f" ({100 * (after / before - 1):+.1f} %)" if before and after is not None else ""


def pairs(title: str, facts: dict, missing: str = "none") -> Table:
    """A table of names and values; underscores in names become spaces, None becomes `missing`."""
    rows = [
        (key.replace("_", " "), missing if value is None else number(value))
        for key, value in facts.items()
    ]
    return Table(title, ("Name", "Value"), rows, facts=True)
