"""The harness itself: what it adds to a call of a known length, and whether two runs of the same
thing agree.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from bench.attention import ours, race
from bench.case import Case, Contender, Entry, Target, entry_of

SPIN = 1e-3  # seconds of the call whose length is known
SPEC = "sliding(window=512)"
SOURCE = "the benchmark: overhead under 2 % at 1 ms"


@dataclass(frozen=True)
class Known(Case):
    """Calls that take as long as they say."""

    def inputs(self, tokens, device, seed=0):
        return [torch.zeros(1, device=device)]

    def answers(self, call, inputs):
        return {}


def spin(case, inputs):
    """A call that is busy for `SPIN` seconds."""

    def call(x):
        end = time.perf_counter() + SPIN
        while time.perf_counter() < end:
            pass

    return call


def _agreement():
    raced = [replace(ours(SPEC), name=name) for name in ("first", "second")]
    return race("forward", "float32", 2048, raced, title="the same twice")


def cases(device, quick):
    """A call of known length, and one contender twice: what the clock is worth."""
    if device == "cpu":  # a GPU's clock is its own
        yield Known("known length", "float32", 1, (Contender("1 ms", spin, ours=True),))
    yield _agreement()


@dataclass(frozen=True)
class Apart:
    """How far the medians of two contenders are apart, over the larger of the spreads that they
    report.
    """

    case: str

    def __call__(self, results):
        names = ("first", "second")
        low, middle, high = (
            [entry_of(results, self.case, who, f"ms_{p}") for who in names]
            for p in ("p20", "p50", "p80")
        )
        if None in (*low, *middle, *high):
            return None
        return abs(middle[0] - middle[1]) / max(b - a for a, b in zip(low, high, strict=True))


def targets(device):
    """Known time is measured within 2 %, and equal ones are told equal."""
    if device == "cpu":
        value = Entry((Known("known length", "float32", 1, ()).name, "1 ms"), "ms_p50", 1000 * SPIN)
        yield Target("measured over true length of a call of 1 ms", value, SOURCE, most=1.02)
    agreement = Apart(_agreement().name)
    said = "two runs of the same: medians apart, over their p20 to p80 spread"
    yield Target(said, agreement, "the benchmark: two runs agree within their spread", most=1)
