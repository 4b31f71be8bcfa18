"""What a shearing's report is made from, by name: its tables and plots read it by this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from effattn.reports.common import Quality
from effattn.reports.document import Document

NAMES = {
    "hidden": "hidden dimensions",
    "heads": "KV heads",
    "ffn": "FFN dimensions",
    "layers": "layers",
}
BASELINES = {
    "scratch": "the same shape from scratch",
    "structured": "one-shot pruning, trained on",
    "taught": "one-shot pruning, taught by the parent",
}
QUALITY, SIZE = "Quality", "Before and after"
MASKS, DOMAINS = "Masks", "Domains"
STAGES = ("masks", "recovered", "continued")


class Point(TypedDict):
    """The domains and masks at one step of a stage."""

    step: int
    tokens: int  # seen in this stage
    losses: list[float]  # by domain, nats a token on held-out windows
    weights: list[float]  # by domain: how often it is read, shares of 1
    removed: NotRequired[dict[str, float]]  # axis -> share, expected
    target: NotRequired[dict[str, float]]  # what the constraint asked for


class Stage(TypedDict):
    """What training says of a stage."""

    tokens: int
    domains: list[str]
    references: list[float]  # nats a token that the weights are steered by
    record: list[Point]
    target: NotRequired[dict[str, int]]  # of the masks: axis -> what stays


class Baseline(TypedDict):
    """A run beside the sheared model, on as many tokens."""

    cut: Quality  # at its start
    continued: Quality
    training: Stage
    criterion: NotRequired[dict[str, str]]  # axis -> what it was cut by


@dataclass
class ShearData(Document):
    """Wraps `data`, a dict of kind "shear": settings, target (axis -> [before, after]), model,
    size, quality (before, cut, recovered, continued: perplexity, cross_entropy and kl in nats a
    token), masks, recovered and continued (what training says, with its record), baselines, speed
    (tokens/s), verification, environment."""

    data: dict
    kind = "shear"
    named = "a shearing's report"

    @property
    def label(self) -> str:
        """The change of shape: "KV heads 8 -> 4, FFN dimensions 704 -> 352"."""
        changed = {
            axis: sizes for axis, sizes in self.data["target"].items() if sizes[0] != sizes[1]
        }
        return ", ".join(
            f"{NAMES[axis]} {before:,} -> {after:,}" for axis, (before, after) in changed.items()
        )

    @property
    def last(self) -> str:
        """The last stage that was measured."""
        return next(
            stage for stage in ("continued", "recovered", "cut") if self.data["quality"].get(stage)
        )

    @property
    def tokens(self) -> int:
        """Tokens that all stages saw."""
        return sum((self.data.get(stage) or {}).get("tokens", 0) for stage in STAGES)

    def points(self) -> list[tuple[int, Point]]:
        """The records of all stages as one: (tokens since the start, point)."""
        found, before = [], 0
        for stage in STAGES:
            facts = self.data.get(stage) or {"tokens": 0, "record": []}
            found += [(before + point["tokens"], point) for point in facts["record"]]
            before += facts["tokens"]
        return found

    @property
    def baselines(self) -> dict[str, Baseline]:
        """Name, one of `BASELINES`, -> what came of it."""
        return self.data["baselines"]
