"""What a report of quantized caches is made from, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from effattn.reports.document import Document

KIND = "quantize_kv"


class FormatQuality(TypedDict):
    """A cache, read token by token on held-out text, beside the full one."""

    perplexity: float
    cross_entropy: float  # nats a token
    parent_cross_entropy: float
    kl: float  # nats a token
    agreement: float  # share of tokens with the same most likely next one
    loss_error: float | None  # standard error of the change, as a share
    tokens: int
    length: int  # tokens of a window


class Format(TypedDict):
    """One cache; the first row is the full one, the last the plan's."""

    name: str
    cache: str
    adapted: str
    quality: FormatQuality
    bytes_per_token: float  # all layers, scales included
    held: list[dict]  # tokens, and predicted, held and allocated bytes
    memory: list[dict]  # context in tokens, bytes


@dataclass
class QuantizeData(Document):
    """Wraps `data`, a dict of kind "quantize_kv".

    Keys: settings, model, formats (a row each: name, cache, adapted, quality, bytes_per_token,
    held, memory; first the full cache, last the plan), sensitivity (layer, spec, kl, ...), plan
    (budget, specs, cache, bytes_per_token, kl; None without a budget), frontier, retrieval, decode,
    saved, verification, environment. Losses and KLs are in nats a token, sizes in bytes, times in
    ms."""

    data: dict
    kind = KIND
    named = "a report of quantize-kv"

    @property
    def rows(self) -> list[Format]:
        """The formats' rows, the full cache's first."""
        return self.data["formats"]

    @property
    def full(self) -> Format:
        """The row of the cache in full precision."""
        return self.rows[0]

    @property
    def swap_call(self) -> str | None:
        """What gives any model of this kind the plan's cache, as Python."""
        plan = self.data["plan"]
        return None if plan is None else f"effattn.swap(model, cache={plan['cache']!r})"


def change(quality: FormatQuality) -> float | None:
    """How far the perplexity is above the parent's on the same tokens, in percent; None where it is
    not finite.
    """
    ours, theirs = quality["cross_entropy"], quality["parent_cross_entropy"]
    if ours is None or theirs is None or not ours - theirs < 100:
        return None
    return 100 * math.expm1(ours - theirs)
