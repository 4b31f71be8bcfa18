"""The report of quantized caches: quality, bytes, layers, plan, retrieval and speed, format beside
format.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from effattn.quant.sensitivity import report_plots as plots
from effattn.quant.sensitivity import report_tables as tables
from effattn.quant.sensitivity.report_data import QuantizeData, change
from effattn.reports.page import Passage, Section, markdown_text, page
from effattn.reports.tables import Table, number


@dataclass
class QuantizeReport(QuantizeData):
    """A measurement of quantized caches as tables, plots and a page."""

    terminal = tables.TERMINAL

    @property
    def title(self) -> str:
        return f"{self.data['settings']['model']}: its key/value cache, quantized"

    @property
    def headline(self) -> str:
        """The result: how much smaller each cache is, and what becomes of the perplexity."""
        said = []
        for row in self.rows[1:]:
            moved = change(row["quality"])
            moved = "perplexity not finite" if moved is None else f"perplexity {moved:+.2f} %"
            said.append(
                f"{row['name']} {self.full['bytes_per_token'] / row['bytes_per_token']:.2f}x "
                f"smaller, {moved}"
            )
        return (
            f"Perplexity {number(self.full['quality']['perplexity'])} with the full "
            f"cache; {'; '.join(said)}."
        )

    def tables(self) -> list[Table]:
        """Every table, the headline's first."""
        return tables.tables(self)

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        parts = [
            Text(self.title, style="bold"),
            Text(self.headline),
            *(part for one in self.shown() for part in ("", one.rich())),
        ]
        return Group(*parts, *(["", Text(self.swap_call)] if self.swap_call else []))

    def to_markdown(self) -> str:
        blocks = [f"# {markdown_text(self.title)}", markdown_text(self.headline)]
        blocks += [passage.markdown() for passage in self._passages()]
        return "\n\n".join([*blocks, *(table.markdown() for table in self.tables())]) + "\n"

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        figures = plots.plots(self)
        sections = [
            Section(table.title, "", figures.get(table.title, []), [table])
            for table in self.tables()
        ]
        for section in sections:
            if section.title == tables.PLAN_TITLE:
                section.passages = self._passages()
        return page(self.title, self.headline, sections)

    def _passages(self) -> list[Passage]:
        return [Passage("To use the plan", "", self.swap_call)] if self.swap_call else []
