"""What a report of `recipes/extend_context.py` is made from, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from effattn.reports.document import Document

KIND = "extend_context"


class Scores(TypedDict):
    """Next-token prediction on some stretch of text."""

    cross_entropy: float  # nats a token
    accuracy: float  # a share of 1
    length: NotRequired[int]  # tokens of a window
    copies: NotRequired[Scores]  # of repeated text, the tokens behind the first copy


class Rule(TypedDict):
    """One position rule, measured; the first is the model as it is."""

    name: str
    axes: dict[str, str]  # what `effattn.swap` was given
    kind: str  # of `effattn.extending.rules`
    logn: bool
    seconds: float
    natural: list[Scores]  # by length
    repeated: list[Scores]
    curves: dict[str, list[dict]]  # text -> buckets of positions: first, last, cross_entropy
    retrieval: dict | None  # rows by depth, score, chance


@dataclass
class ArticleData(Document):
    """Wraps `data`, a dict of kind "extend_context".

    Keys: settings, model, copy (has the model learned to copy), task and task_learned (of
    retrieval), within (the tasks within the trained length), rules (a row each, the baseline first:
    name, axes, kind, logn, seconds, natural, repeated, curves, retrieval), environment. Losses are
    in nats a token, accuracies shares of 1."""

    data: dict
    kind = KIND
    named = "a report of extend_context"

    @property
    def rules(self) -> list[Rule]:
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

    @property
    def own(self) -> dict[str, dict[str, str]]:
        """The patterns and positions that the model was trained with, by axis and layer; {} for its
        class's own."""
        return self.data["model"].get("own") or {}

    def at(self, row: Rule, length: int | None = None) -> Scores:
        """A rule's cell for natural text at a length, the longest if none is given."""
        return next(cell for cell in row["natural"] if cell["length"] == (length or self.longest))

    def loss(self, row: Rule, length: int | None = None) -> float:
        """Cross-entropy of natural text, nats a token; `length` as in `at`."""
        return self.at(row, length)["cross_entropy"]

    def copied(self, row: Rule) -> float:
        """Accuracy on the copies of the repeated text, at the longest length."""
        return row["repeated"][-1]["copies"]["accuracy"]

    def best(self, rows: Sequence[Rule]) -> Rule | None:
        """The row with the lowest loss on natural text at the longest length."""
        return min(rows, key=self.loss, default=None)
