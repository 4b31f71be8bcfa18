"""Score rules: how a pair's score depends on the distance i - j between query and key, besides q .
k.

    attention(q, k, v, far=Far(q_far, k_far, window=256))              # ReRoPE, Leaky ReRoPE
    attention(q, k, v, bias=Bias("alibi", slopes[:, None]))            # ALiBi, KERPLE, T5, Sandwich

Both go with every pattern, padding and a soft cap; not with each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.kernels.errors import check_choice

from .pattern import Layout, Pattern, Window

# kind -> numbers a head; None: any
BIASES: dict[str, int | None] = {"alibi": 1, "kerple_log": 2, "kerple_power": 2, "table": None}


@dataclass(frozen=True, eq=False)
class Far:
    """Pairs at distance i - j >= window are scored by q . k of this instead; causal attention only.

    q (B, Hq, Tq, D) and k (B, Hkv, Tk, D) are rotated by the caller, as the near ones are: ReRoPE
    (Su 2023, https://kexue.fm/archives/9708) has q at position `window` and k at 0, Leaky ReRoPE q
    at (i - window) / slow + window and k at j / slow. Gradients flow to both."""

    q: Tensor
    k: Tensor
    window: int

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"far.window: got {self.window}, valid are 1 and more tokens")


@dataclass(frozen=True, eq=False)
class Bias:
    """Added to the scaled (and soft-capped) score of a pair at distance d = |i - j|; params (Hq or
    1, n):

    kind            params of a head     value
    "alibi"         m                    -m d                   ALiBi (arXiv:2108.12409)
    "kerple_log"    r1, r2 > 0           -r1 log(1 + r2 d)      KERPLE (arXiv:2205.09921), eq. 3
    "kerple_power"  r1 > 0, 0 < r2 <= 2  -r1 d^r2               KERPLE
    "table"         one for 0 .. n - 1   params[min(d, n - 1)]  T5 buckets, Sandwich
                                                                (arXiv:2212.10356)

    Gradients flow to params, in plain torch only.
    """

    kind: str
    params: Tensor

    def __post_init__(self):
        numbers = BIASES[check_choice("bias.kind", self.kind, BIASES)]
        shape = tuple(self.params.shape)
        if len(shape) != 2 or not shape[1] or (numbers is not None and shape[1] != numbers):
            valid = f"(heads or 1, {'at least 1' if numbers is None else numbers})"
            raise ValueError(f"bias.params: got shape {shape}, valid for {self.kind!r} is {valid}")

    def values(self, distance: Tensor) -> Tensor:
        """What to add at these distances, (Hq or 1, *distance.shape), in params' dtype,
        differentiable by params.
        """
        distance = distance.abs()
        if self.kind == "table":
            return self.params[:, distance.clamp(max=self.params.shape[1] - 1)]
        first, *rest = (x.view(-1, *[1] * distance.dim()) for x in self.params.unbind(dim=1))
        distance = distance.to(first.dtype)
        if self.kind == "alibi":
            return -first * distance
        if self.kind == "kerple_log":
            return -first * torch.log1p(rest[0] * distance)
        # 0^r2 is 0 with gradient 0; pow's own gradient by r2 is NaN there
        power = distance.clamp(min=1).pow(rest[0])
        return -first * torch.where(distance == 0, 0.0, power)


def check(
    far: Far | None,
    bias: Bias | None,
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    layout: Layout,
    causal: bool,
    q_first: Tensor | None,
) -> Far | None:
    """`far`, or None where no pair is. ValueError if the rules do not fit each other or the
    tensors.
    """
    if bias is not None and bias.params.shape[0] not in (1, q.shape[1]):
        raise ValueError(
            f"bias.params: got {bias.params.shape[0]} heads, valid are 1 and {q.shape[1]}, the "
            "queries'"
        )
    if far is None:
        return None
    if not causal:
        raise ValueError(
            "far: got causal=False, valid is causal attention: far keys lie before the query"
        )
    if bias is not None:
        raise ValueError(
            "far: got a bias too, valid is one of them: each is a position rule of its own"
        )
    if q_first is not None and pattern.first:
        raise ValueError(
            "far: got q_first too, valid is one of them: both replace the query for some keys"
        )
    for name, got, like in (("q", far.q, q), ("k", far.k, k)):
        if (got.shape, got.dtype, got.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"far.{name}: got {tuple(got.shape)} {got.dtype} on {got.device}, "
                f"valid is as {name}: {tuple(like.shape)} {like.dtype} on {like.device}"
            )
    farthest = layout.tokens(k.shape[2])
    if isinstance(pattern, Window) and not pattern.first:
        farthest = min(farthest, pattern.back)
    return far if far.window < farthest else None
