"""The report of `recipes/extend_context.py`: every position rule on the same long texts.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effattn.extending import article_plots, article_tables
from effattn.extending.article_data import ArticleData
from effattn.reports.files import write_text_atomic
from effattn.reports.tables import Table


@dataclass
class ArticleReport(ArticleData):
    """An article's data as tables and plots."""

    terminal = article_tables.TERMINAL

    @property
    def title(self) -> str:
        return (
            f"{self.data['settings']['model']}: {self.trained:,} tokens trained, "
            f"{self.longest:,} read"
        )

    @property
    def headline(self) -> str:
        """The result: the best rule beside the model as it is, and beside fresh windows."""
        base = self.rules[0]
        said = (
            f"Loss on the same text in windows of {self.trained:,}: "
            f"{self.loss(base, self.trained):.3f}"
        )
        said += f"; at {self.longest:,} tokens: {base['name']} {self.loss(base):.3f}"
        for row in [one for one in (self.best(self.rules[1:]),) if one]:
            said += f", {row['name']} {self.loss(row):.3f}, the lowest"
        best = max(self.rules, key=self.copied)
        return (
            f"{said}. Most copied from far back: {best['name']}, {100 * self.copied(best):.1f} "
            "% of tokens."
        )

    def tables(self) -> list[Table]:
        return article_tables.tables(self)

    def plots(self) -> dict[str, list]:
        return article_plots.plots(self)

    def save_json(self, path: Path | str) -> None:
        """Writes the results alone, whole or not at all."""
        write_text_atomic(path, self.to_json())
