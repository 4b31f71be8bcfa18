"""The report of `recipes/extend_context.py`: every position rule on the same long texts.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effattn.extending import article_plots, article_tables
from effattn.reports.document import Document
from effattn.reports.files import write_text_atomic
from effattn.reports.tables import Table

KIND = "extend_context"


@dataclass
class ArticleReport(Document):
    """Wraps `data`, a dict of kind "extend_context".

    Keys: settings, model, copy (has the model learned to copy), task and task_learned (of
    retrieval), within (the tasks within the trained length), rules (a row each, the baseline first:
    name, axes, kind, logn, seconds, natural, repeated, curves, retrieval), environment. Losses are
    in nats a token, accuracies shares of 1."""

    data: dict
    terminal = article_tables.TERMINAL

    def __post_init__(self):
        if self.data.get("kind") != KIND:
            raise ValueError(
                f"kind: got {self.data.get('kind')!r}, a report of extend_context has {KIND!r}"
            )

    @property
    def rules(self) -> list[dict]:
        """A row for each position rule."""
        return self.data["rules"]

    @property
    def lengths(self) -> list[int]:
        """Tokens read, ascending."""
        return self.data["settings"]["lengths"]

    @property
    def longest(self) -> int:
        """The last of `lengths`."""
        return self.lengths[-1]

    @property
    def trained(self) -> int:
        """The model's trained length, in tokens."""
        return self.data["model"]["trained_length"]

    def at(self, row: dict, length: int | None = None) -> dict:
        """A rule's cell for natural text at a length, the longest if none is given."""
        return next(cell for cell in row["natural"] if cell["length"] == (length or self.longest))

    def loss(self, row: dict, length: int | None = None) -> float:
        """Cross-entropy of natural text, nats a token; `length` as in `at`."""
        return self.at(row, length)["cross_entropy"]

    def copied(self, row: dict) -> float:
        """Accuracy on the copies of the repeated text, at the longest length."""
        return row["repeated"][-1]["copies"]["accuracy"]

    def best(self, rows: Sequence[dict]) -> dict | None:
        """The row with the lowest loss on natural text at the longest length."""
        return min(rows, key=self.loss, default=None)

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
