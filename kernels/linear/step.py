"""One token over a state of linear attention, in plain operations that a graph can hold: which
keys count, and how old the sums are, are tensors.

q (B, Hq, 1, D), k (B, Hkv, N, D), v (B, Hkv, N, V); sums S (B, Hkv, F, V), n (B, Hkv, F)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import Memory
from .features import MAPS
from .torch_parts import scaled, share_of


class Options(NamedTuple):
    """What a call is about, as `effattn.kernels.linear.attention` takes it."""

    feature_map: str
    directions: Tensor | None = None
    decay: Tensor | None = None
    normalize: bool = True
    scale: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """Of q and k before the feature map."""
        if not MAPS[self.feature_map].directed:
            return 1.0, 1.0
        root = abs(self.scale) ** 0.5
        return (root if self.scale >= 0 else -root), root

    def features(self, x: Tensor, factor: float, dtype) -> tuple[Tensor, Tensor | None]:
        """phi and the log weights mu of x."""
        directions = None if self.directions is None else self.directions.to(dtype)
        return MAPS[self.feature_map].forward(scaled(x, factor, dtype), directions)


def read(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory, real: Tensor, age: Tensor, past: Tensor,
    options: Options,
) -> Tensor:  # fmt: skip
    """out (B, Hq, 1, V): as `effattn.kernels.linear.attention`, over `memory` and those keys that
    are `real`, (1 or B, N) bool. age (N,): how many tokens before the query each key is; past
    (0-d): how many the last one in the memory is."""
    dtype = memory.sums.dtype
    batch, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    q, _ = options.features(
        q.reshape(batch, kv_heads, heads // kv_heads, dim), options.factors[0], dtype
    )
    k, mu = options.features(k, options.factors[1], dtype)
    real, weight, before = real[:, None], torch.ones((), dtype=dtype, device=q.device), None
    if options.decay is not None:
        rate = options.decay.to(dtype)[:, None]
        weight, before = rate ** age.clamp(min=0), rate[..., None] ** past
    if mu is not None:
        mu = mu.masked_fill(~real, -torch.inf)
        high = torch.maximum(memory.top, mu.amax(dim=-1))
        finite = high.masked_fill(high == -torch.inf, 0)  # where nothing has come
        weight, before = (
            (mu - finite[..., None]).exp(),
            (memory.top - finite).exp()[..., None, None],
        )
    weights = torch.where(real, weight, 0.0)[:, :, None]
    scores = (q @ k.mT) * weights
    past_q = q if before is None else q * before
    out = scores @ v.to(dtype) + past_q @ memory.sums
    if not options.normalize:
        return (out * options.scale).reshape(batch, heads, 1, -1)
    total = scores.sum(dim=-1) + (past_q @ memory.norms[..., None])[..., 0]
    return (out * share_of(total)[..., None]).reshape(batch, heads, 1, -1)


def fold(k: Tensor, v: Tensor, memory: Memory, real: Tensor, due: Tensor, options: Options) -> None:
    """Adds keys to the memory, in place, if they are `due` (0-d bool): those that are `real`, (1 or
    B, N) bool, in order and right behind what it holds."""
    dtype, count = memory.sums.dtype, k.shape[2]
    k, mu = options.features(k, options.factors[1], dtype)
    real, weight, kept = (real & due)[:, None], torch.ones((), dtype=dtype, device=k.device), None
    if options.decay is not None:
        rate = options.decay.to(dtype)[:, None]
        weight = rate ** torch.arange(count - 1, -1, -1, device=k.device)
        kept = torch.where(due, rate**count, 1.0)
    if mu is not None:
        mu = mu.masked_fill(~real, -torch.inf)
        high = torch.maximum(memory.top, mu.amax(dim=-1))
        finite = high.masked_fill(high == -torch.inf, 0)
        weight, kept = (mu - finite[..., None]).exp(), (memory.top - finite).exp()[..., None]
        memory.top.copy_(high)
    k = k * torch.where(real, weight, 0.0)[..., None]
    if kept is not None:
        memory.sums.mul_(kept[..., None])
    memory.sums.add_(k.mT @ v.to(dtype))
    if memory.norms is not None:
        if kept is not None:
            memory.norms.mul_(kept)
        memory.norms.add_(k.sum(dim=2))
