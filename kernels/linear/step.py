"""One token over a state of linear attention, in few and plain operations: for CPUs, where each one
costs as much as all of its numbers, and for graphs. Which keys count, and how old they and the sums
are, may be tensors.

q (B, Hq, 1, D), k (B, Hkv, N, D), v (B, Hkv, N, V); sums S (B, Hkv, F, V), n (B, Hkv, F); top (B,
Hkv)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import MAPS
from .torch_parts import scaled, share_of


class Options(NamedTuple):
    """What a call is about, as in `torch_parts.Spec`. dtype: of the sums."""

    feature_map: str
    directions: Tensor | None
    decay: Tensor | None
    normalize: bool
    factors: tuple[float, float]
    gain: float
    dtype: torch.dtype

    def features(self, x: Tensor, factor: float) -> tuple[Tensor, Tensor | None]:
        """phi and the log weights mu of x."""
        directions = None if self.directions is None else self.directions.to(self.dtype)
        return MAPS[self.feature_map].forward(scaled(x, factor, self.dtype), directions)


Memory = tuple[Tensor, Tensor | None, Tensor | None]  # sums, norms and top


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory | None,
    real: Tensor | None,
    age: Tensor | None,
    past: Tensor | int,
    options: Options,
) -> Tensor:
    """out (B, Hq, 1, V), in the sums' dtype: of the memory and those keys that are `real`, (1 or B,
    N) bool. With decay, age (N,): how many tokens before the query each key is; past: how many the
    last one in the memory is."""
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    sums, norms, top = memory or (None, None, None)
    q, _ = options.features(q.reshape(batch, kv_heads, heads // kv_heads, dim), options.factors[0])
    k, mu = options.features(k, options.factors[1])
    real = None if real is None else real[:, None]
    weight = before = None
    if options.decay is not None:
        rate = options.decay.to(options.dtype)[:, None]
        weight, before = rate ** age.clamp(min=0), rate[..., None] ** past
    if mu is not None:
        mu = mu if real is None else mu.masked_fill(~real, -torch.inf)
        high = mu.amax(dim=-1) if top is None else torch.maximum(top, mu.amax(dim=-1))
        high = high.masked_fill(high == -torch.inf, 0)  # where nothing has come
        weight = (mu - high[..., None]).exp()
        before = None if top is None else (top - high).exp()[..., None, None]
    scores = q @ k.mT
    if weight is not None:
        scores = scores * weight[..., None, :]
    if real is not None:
        scores = torch.where(real[:, :, None], scores, 0.0)
    out = scores @ v.to(options.dtype)
    if sums is not None:
        q = q if before is None else q * before
        out = out + q @ sums.to(options.dtype)
    if not options.normalize:
        return (out * options.gain).reshape(batch, heads, 1, -1)
    total = scores.sum(dim=-1, keepdim=True)
    if norms is not None:
        total = total + q @ norms.to(options.dtype)[..., None]
    return (out * share_of(total)).reshape(batch, heads, 1, -1)


def fold(k: Tensor, v: Tensor, memory: Memory, real: Tensor, due: Tensor, options: Options) -> None:
    """Adds keys to the memory, in place, if they are `due` (0-d bool): those that are `real`, (1 or
    B, N) bool, in order and right behind what it holds."""
    count, (sums, norms, top) = k.shape[2], memory
    k, mu = options.features(k, options.factors[1])
    real, weight, kept = (real & due)[:, None], sums.new_ones(()), None
    if options.decay is not None:
        rate = options.decay.to(options.dtype)[:, None]
        weight = rate ** torch.arange(count - 1, -1, -1, device=k.device)
        kept = torch.where(due, rate**count, 1.0)
    if mu is not None:
        mu = mu.masked_fill(~real, -torch.inf)
        high = torch.maximum(top, mu.amax(dim=-1))
        finite = high.masked_fill(high == -torch.inf, 0)
        weight, kept = (mu - finite[..., None]).exp(), (top - finite).exp()[..., None]
        top.copy_(high)
    k = k * torch.where(real, weight, 0.0)[..., None]
    if kept is not None:
        sums.mul_(kept[..., None])
    sums.add_(k.mT @ v.to(options.dtype))
    if norms is not None:
        if kept is not None:
            norms.mul_(kept)
        norms.add_(k.sum(dim=2))
