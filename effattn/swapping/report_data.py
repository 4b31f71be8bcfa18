"""What a swap report is made from, by name: tables, plots and the page read it through this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

from effattn.evaluate.loss import perplexity_of
from effattn.reports.document import Document


class Span(TypedDict):
    """A stretch of a stream."""

    first: int  # position of its first token
    last: int  # and behind its last one
    perplexity: float
    cross_entropy: float  # nats a token


class Stream(TypedDict):
    """One long text, fed through the cache; of the reference, in fresh windows."""

    tokens: int
    seconds: float
    spans: list[Span]
    buckets: list[Span]  # the same, finer
    cache_bytes: NotRequired[list[tuple[int, int]]]  # (tokens, bytes)
    context: NotRequired[int]  # the reference's windows, in tokens


class Run(TypedDict):
    """A pattern that was measured; "before" is the model as it was."""

    label: str
    role: Literal["before", "pattern", "baseline"]
    pattern: str
    contexts: list[dict]  # context, perplexity, cross_entropy, seconds
    stream: Stream
    text: dict | None  # tokens, within and past the trained length, seconds
    layers: list[str]  # each layer's pattern


@dataclass
class SwapData(Document):
    """Wraps `data`, a dict of kind "swap_backend".

    Keys: settings, model, runs (before, the patterns, baselines: each with contexts, stream and
    text), reference (the same stream in fresh windows), prompt, verification (null without an
    output), environment. Perplexities come with their cross-entropy in nats a token; cache_bytes
    are pairs (tokens, bytes)."""

    data: dict
    kind = "swap_backend"
    named = "a swap report"

    @property
    def settings(self) -> dict:
        """What was asked for."""
        return self.data["settings"]

    @property
    def runs(self) -> list[Run]:
        """What was measured of each pattern."""
        return self.data["runs"]

    @property
    def trained(self) -> int | None:
        """The model's trained length, in tokens."""
        return self.data["model"]["trained_length"]

    @property
    def main(self) -> Run:
        """The run of the first pattern: the one that the report is about, and that is saved."""
        return next(run for run in self.runs if run["role"] == "pattern")

    @property
    def reference(self) -> Stream:
        """The unchanged model on the same stream, in fresh windows."""
        return self.data["reference"]

    @property
    def reference_label(self) -> str:
        """The unchanged model's row, in words."""
        return f"reference: windows of {self.reference['context']:,}"


def number(value: float | None) -> str:
    """A perplexity as a person reads it."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def past(found: dict, trained: int | None) -> dict:
    """Scores of the part of a stream that lies past the trained length (of all of it where it does
    not get there): {first, last, perplexity}. Spans are put together by their lengths."""
    spans = [span for span in found["spans"] if span["first"] >= (trained or 0)] or found["spans"]
    count = spans[-1]["last"] - spans[0]["first"]
    sums = [
        (span["last"] - span["first"])
        * (math.nan if span["cross_entropy"] is None else span["cross_entropy"])
        for span in spans
    ]
    return {
        "first": spans[0]["first"],
        "last": spans[-1]["last"],
        "perplexity": perplexity_of(sum(sums) / count),
    }
