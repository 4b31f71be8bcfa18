"""Keys that are stored before their rotation, and rotated when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flash.pattern import Pattern
from ..flash.rules import Bias


@dataclass(frozen=True, eq=False)
class Turn:
    """Keys are stored raw and rotated when they are read; q is given already rotated to its own
    position i.

    A key at position j (from the row's first real token) is rotated to j; but for pairs at distance
    i - j >= window the query is `q_far` and the key stands at j / slow (Leaky ReRoPE), at 0 for
    slow = inf (ReRoPE: no rotation at all). The positions of `kernels.flash.Far`, so that decoding
    equals prefill."""

    inv_freq: Tensor  # (R/2,) fp32, R the first dimensions of a head, which turn; the others do not
    interleaved: bool = (
        False  # pairs are (0, 1), (2, 3), ... instead of (0, R/2), (1, R/2 + 1), ...
    )
    scaling: float = 1.0  # multiplies cos and sin, of far keys too
    window: int | None = None  # None: no pair is far
    slow: float = math.inf
    q_far: Tensor | None = None  # (B, Hq, Tq, D)

    def __post_init__(self):
        if (self.window is None) != (self.q_far is None):
            raise ValueError("turn: got only one of window and q_far, valid are both or neither")
        if self.window is not None and self.window < 1:
            raise ValueError(f"turn.window: got {self.window}, valid are 1 and more tokens")
        if not self.slow >= 1:
            raise ValueError(f"turn.slow: got {self.slow}, valid are 1 and more (inf: ReRoPE)")

    def keys(self, k: Tensor, position: Tensor, far: bool = False) -> Tensor:
        """k (B, H, T, D) rotated to `position` (1 or B, T), or with `far` to position / slow; in
        k's dtype, computed in at least fp32. Negative positions (keys that are not there) give
        finite numbers."""
        if far and math.isinf(self.slow) and self.scaling == 1:
            return k
        cos, sin = self.cos_sin(position, torch.promote_types(k.dtype, torch.float32), far)
        return rotate(k, cos[:, None], sin[:, None], self.interleaved)

    def cos_sin(
        self, position: Tensor, dtype: torch.dtype, far: bool = False
    ) -> tuple[Tensor, Tensor]:
        """By which `keys` rotates, `scaling` included, (1 or B, T, R/2)."""
        slow = self.slow if far else 1.0
        angle = (position.to(dtype) / slow)[..., None] * self.inv_freq.to(position.device, dtype)
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if self.scaling == 1 else (cos * self.scaling, sin * self.scaling)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first R dimensions of x (..., D) by cos and sin (..., R/2), in their dtype;
    returns x's.
    """
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.split(half, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(
        x.dtype
    )
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def check(
    turn: Turn | None,
    bias: Bias | None,
    q: Tensor,
    pattern: Pattern,
    causal: bool,
    q_first: Tensor | None,
) -> None:
    """ValueError if the turn does not fit the call."""
    if turn is None:
        return
    if 2 * len(turn.inv_freq) > q.shape[-1]:
        raise ValueError(
            f"turn.inv_freq: got {len(turn.inv_freq)} frequencies, at most {q.shape[-1] // 2} are "
            "valid"
        )
    if turn.window is None:
        return
    if not causal:
        raise ValueError(
            "turn.window: got causal=False, valid is causal attention: far keys lie before the "
            "query"
        )
    if bias is not None:
        raise ValueError(
            "turn.window: got a bias too, valid is one of them: each is a position rule of its own"
        )
    if q_first is not None and pattern.first:
        raise ValueError(
            "turn.window: got q_first too, valid is one of them: both replace the query for some "
            "keys"
        )
    if (turn.q_far.shape, turn.q_far.dtype) != (q.shape, q.dtype):
        raise ValueError(
            f"turn.q_far: got {tuple(turn.q_far.shape)} {turn.q_far.dtype}, valid is as q: "
            f"{tuple(q.shape)} {q.dtype}"
        )
