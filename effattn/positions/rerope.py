"""ReRoPE and Leaky ReRoPE (Su 2023, https://kexue.fm/archives/9708 and 9731): distances beyond a
window are clipped, or grow more slowly, so that no distance exceeds what the model was trained
with.

Pairs at distance D = i - j < window are scored as ever, (R^i q).(R^j k). For the others, ReRoPE
scores (R^w q).k and Leaky ReRoPE (R^((i - w)/k + w) q).(R^(j/k) k): distance min(D, w) or min(D, w
+ (D - w)/k). At D = w both agree. Decoding stores keys raw and turns them when they are read, so it
equals prefill."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from effattn.errors import Unsupported
from effattn.positions.base import NO_ROTARY, Part, Trained, check_count, check_number, register


@dataclass(frozen=True)
class Far(Part):
    """A part that lets pairs at a distance of `window` tokens or more see each other
    differently.
    """

    window: int

    slot = "far"
    causal_only = True
    stretches = True
    slow: ClassVar[float] = math.inf  # how many times slower distances grow there

    def __post_init__(self):
        check_count(self.name, "window", self.window)

    def check(self, trained: Trained) -> None:
        if not trained.dims:
            raise Unsupported(
                f"positions: {self.name!r} clips the distance of rotary positions, {NO_ROTARY}"
            )
        if self.window >= trained.length:
            warnings.warn(
                f"{self.name}: window={self.window} is not below the {trained.length} tokens that "
                "the model was trained with: distances up to it, which it has never seen, stay as "
                "they are, so nothing is gained; a quarter to a half of the trained length works "
                f"best, {trained.length // 4} to {trained.length // 2}",
                stacklevel=2,
            )

    def query_positions(self, positions: Tensor) -> Tensor:
        """Where a query at `positions`, int64 (T,) or (B, T), stands for far keys: in tokens,
        float64 where distances grow slowly."""
        # Against a key at j/k: (i - w)/k + w - j/k = w + (i - j - w)/k, the distance wanted. ReRoPE
        # is k = infinity: the query stands at w, all keys at 0.
        if math.isinf(self.slow):
            return positions.new_full(positions.shape, self.window)
        return (positions - self.window).double() / self.slow + self.window

    def key_positions(self, positions: Tensor) -> Tensor:
        """Where a key at `positions` stands for far queries: as `query_positions`."""
        return (
            positions.new_zeros(positions.shape)
            if math.isinf(self.slow)
            else positions.double() / self.slow
        )


@register("rerope")
@dataclass(frozen=True)
class ReRope(Far):
    """ReRoPE (https://kexue.fm/archives/9708): distances are clipped at `window` tokens. Causal
    only."""


@register("leaky_rerope")
@dataclass(frozen=True)
class LeakyReRope(Far):
    """Leaky ReRoPE (https://kexue.fm/archives/9731): beyond `window` tokens, distances grow `k`
    times more slowly. Usable while window + (L - window)/k stays below the trained length."""

    k: float

    def __post_init__(self):
        super().__post_init__()
        check_number("leaky_rerope", "k", self.k, least=1)

    @property
    def slow(self) -> float:
        return float(self.k)
