"""What the torch sweeps over the tokens share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import MAPS, FeatureMap

NOTHING = 1e8  # smallest normal numbers: so little weight counts as none


class Spec(NamedTuple):
    """What a call is about, besides its tensors. `factors`: of q and k before the feature map;
    `gain`: of the output; `keep`: whether the memory at the end is wanted."""

    feature_map: str
    factors: tuple[float, float]
    normalize: bool
    causal: bool
    gain: float
    keep: bool
    chunk: int

    @property
    def map(self) -> FeatureMap:
        """The feature map."""
        return MAPS[self.feature_map]


class Sums(NamedTuple):
    """What was before: S = sum phi(k) v (B, H, F, V), n = sum phi(k) (B, H, F), None without a
    normaliser, and c, the highest mu (B, H), None for features without mu, to which S and n are
    relative."""

    values: Tensor
    norms: Tensor | None
    top: Tensor | None

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        spec: Spec,
        features: int,
        dtype: torch.dtype,
        memory=(None, None, None),
    ) -> Sums:
        """What `memory` holds in `dtype`; nothing yet where that is None."""
        if memory[0] is not None:
            return cls(*(None if x is None else x.to(dtype) for x in memory))
        zero = k.new_zeros(*k.shape[:2], features, v.shape[3], dtype=dtype)
        top = zero.new_full(k.shape[:2], -torch.inf) if spec.map.weighs else None
        return cls(zero, zero.new_zeros(zero.shape[:3]) if spec.normalize else None, top)


def joined(sums: Tensor, norms: Tensor | None) -> Tensor:
    """S (.., F, V) and n (.., F) beside each other, (.., F, W): W = V + 1, or V without n."""
    return sums if norms is None else torch.cat([sums, norms.unsqueeze(-1)], dim=-1)


def share_of(total: Tensor) -> Tensor:
    """One over the normaliser; 0 where that is 0, or so near that gradients times its reciprocal
    would overflow.
    """
    nothing = total.abs() < NOTHING * torch.finfo(total.dtype).tiny
    return total.reciprocal().masked_fill_(nothing, 0)


def output_gradient(grad: Tensor, share: Tensor, out: Tensor) -> Tensor:
    """d y (.., V + 1), the normaliser's gradient last, of out = y[..., :-1] share; grad and out
    (.., V).
    """
    dy = grad.new_empty(*grad.shape[:-1], grad.shape[-1] + 1)
    own = torch.mul(grad, share, out=dy[..., :-1])
    dy[..., -1:] = (own * out).sum(dim=-1, keepdim=True).neg_()
    return dy


def scaled(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """x times factor in `dtype`; x itself where that changes nothing."""
    x = x.to(dtype)
    return x if factor == 1 else x * factor
