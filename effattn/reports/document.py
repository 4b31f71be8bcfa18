"""What every report is: one JSON-able dict, shown as tables on the terminal, in Markdown and on a
page with plots.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

from effattn.reports.common import HARNESS
from effattn.reports.files import finite, numbers, write_all_atomic
from effattn.reports.page import Section, markdown_text, page
from effattn.reports.tables import Table


class Document:
    """Base of the reports. A subclass is a dataclass with the field `data`; it sets `kind`, the
    "kind" of the data that it reads (empty: any), `named`, how errors call it, and `terminal`, the
    titles of the tables that a person wants on the terminal; and writes `title`, `headline` and
    `tables`, and `plots` if it has any. ValueError for data of another kind."""

    data: dict
    kind: ClassVar[str] = ""
    named: ClassVar[str] = ""
    terminal: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if self.kind and self.data.get("kind") != self.kind:
            raise ValueError(f"kind: got {self.data.get('kind')!r}, {self.named} has {self.kind!r}")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads report.json, or the one in a folder."""
        path = Path(path)
        return cls(
            numbers(
                json.loads(
                    (path / "report.json" if path.is_dir() else path).read_text(encoding="utf-8")
                )
            )
        )

    def part(self, name: str) -> dict:
        """A part of `data`, empty if it is null or absent."""
        return self.data.get(name) or {}

    @property
    def title(self) -> str:
        """What was done to which model, in one line."""
        raise NotImplementedError

    @property
    def headline(self) -> str:
        """The result in a sentence."""
        raise NotImplementedError

    def tables(self) -> list[Table]:
        """Every table, the headline's first."""
        raise NotImplementedError

    def plots(self) -> dict[str, list]:
        """Section -> its figures."""
        return {}

    def shown(self) -> list[Table]:
        """The tables that a person wants on the terminal."""
        wanted = (*self.terminal, HARNESS)
        return [table for table in self.tables() if table.title in wanted]

    def table(self):
        """What a person wants on the terminal, as one rich renderable."""
        from rich.console import Group
        from rich.text import Text

        return Group(
            Text(self.title, style="bold"),
            Text(self.headline),
            *(part for one in self.shown() for part in ("", one.rich())),
        )

    def __rich__(self):
        return self.table()

    def to_json(self) -> str:
        """All of the data; numbers that are not finite become null."""
        return json.dumps(finite(self.data), indent=1, default=str, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Title, headline and tables."""
        blocks = [f"# {markdown_text(self.title)}", markdown_text(self.headline)]
        return "\n\n".join([*blocks, *(table.markdown() for table in self.tables())]) + "\n"

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        plots = self.plots()
        sections = [
            Section(table.title, "", plots.get(table.title, []), [table]) for table in self.tables()
        ]
        return page(self.title, self.headline, sections)

    def save(self, folder: Path | str) -> None:
        """Writes report.md, report.html and, last, report.json into `folder`: all of them or
        none.
        """
        files = {
            "report.md": self.to_markdown(),
            "report.html": self.to_html(),
            "report.json": self.to_json(),
        }
        write_all_atomic(folder, files)
