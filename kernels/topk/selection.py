"""Which blocks each query reads: summaries of blocks of keys, and the best of them for a query.

B: rows; H: key/value heads, G query heads each; T: keys; Tq: queries; N: blocks of `block` keys,
counted from each row's first real token; W: numbers of a summary; n: blocks that a query reads at
most. Positions count from each row's first real token too.

Everything is computed in float32 (float64 for float64 inputs), whatever the keys' dtype, so that
prefill and decoding choose alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUMMARIES = ("mean", "minmax", "spread", "learned")
# scores of queries and blocks at a time: on a CPU few, since only blocks that are finished then are
# looked at
SCORES = {"cpu": 2**19}
MOST_SCORES = 2**25


@dataclass(frozen=True)
class Rule:
    """A query sees its `window` newest keys, the `sinks` first ones, and the `blocks` best blocks
    of `block` keys. summary: of `SUMMARIES`."""

    window: int
    sinks: int = 0
    block: int = 16
    blocks: int = 8
    summary: str = "mean"

    def width(self, dim: int) -> int:
        """Numbers of a summary of keys of `dim`."""
        return 2 * dim if self.summary in ("minmax", "spread") else dim

    @property
    def first(self) -> int:
        """The first block that is not sinks alone."""
        return self.sinks // self.block

    def end(self, at: Tensor) -> Tensor:
        """Behind the last block that queries at positions `at` may choose: finished, and with keys
        that are neither in the window nor sinks. Negative positions are padding."""
        beyond = at - self.window  # the newest key behind the window
        last = torch.minimum((at + 1) // self.block, beyond // self.block + 1)
        return torch.where(beyond >= self.sinks, last, 0).clamp(min=0)

    def candidates(self, at: Tensor, block: Tensor) -> Tensor:
        """Whether the query at position `at` may choose a block, broadcast."""
        return (block >= self.first) & (block < self.end(at))


def work_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def summarise(
    rule: Rule,
    k: Tensor,
    pool: Tensor | None = None,
) -> Tensor:
    """k (B, H, T, D), from a block's beginning on -> summaries (B, H, T // block, W) of its whole
    blocks.

    "mean": the mean key. "minmax": the largest and the smallest of each number, side by side
    (Quest, arXiv:2406.10774). "spread": the mean key, and a quarter of the way from the smallest to
    the largest of each number. "learned": a mean with weights softmax(pool . k), pool (H, D)."""
    count = k.shape[2] // rule.block
    keys = k[:, :, : count * rule.block].unflatten(2, (count, rule.block)).to(work_dtype(k))
    if rule.summary == "mean":
        return keys.mean(dim=3)
    if rule.summary == "minmax":
        return torch.cat([keys.amax(dim=3), keys.amin(dim=3)], dim=3)
    if rule.summary == "spread":
        return torch.cat([keys.mean(dim=3), (keys.amax(dim=3) - keys.amin(dim=3)) / 4], dim=3)
    logits = (keys * pool.to(keys.dtype)[:, None, None]).sum(dim=4, keepdim=True)
    return (torch.softmax(logits, dim=3) * keys).sum(dim=3)


def probes(
    rule: Rule,
    q: Tensor,
    kv_heads: int,
) -> Tensor:
    """What summaries are multiplied with, (B, H, Tq, W): the product is the sum of the group's
    scores, so that its heads share a selection.

    q . mean for "mean" and "learned". For "minmax" the largest score that a key between the two
    could have: a positive number of q meets the largest, a negative one the smallest. For "spread"
    q . mean and half of what "minmax" adds to the middle of its two: a block's attention is often
    that of its furthest key, but none is as far out in all of its numbers at once."""
    group = q.unflatten(1, (kv_heads, -1)).to(work_dtype(q))
    if rule.summary == "spread":
        return torch.cat([group.sum(dim=2), group.abs().sum(dim=2)], dim=3)
    if rule.summary != "minmax":
        return group.sum(dim=2)
    return torch.cat([group.clamp(min=0).sum(dim=2), group.clamp(max=0).sum(dim=2)], dim=3)


@torch.no_grad()
def select(
    rule: Rule,
    q: Tensor,
    summaries: Tensor,
    at: Tensor,
) -> Tensor:
    """The best candidates of each query, int64 (B, H, Tq, n), in no order; -1 where there are
    fewer.

    q (B, Hq, Tq, D); summaries (B, H, N, W); at (1 or B, Tq) int64 positions, negative for padding.
    A query's choice depends on no later token."""
    batch, heads, blocks = summaries.shape[:3]
    most = min(rule.blocks, blocks)
    found = at.new_full((batch, heads, q.shape[2], most), -1)
    if not most:
        return found
    probe, number = probes(rule, q, heads), torch.arange(blocks, device=q.device)
    most_scores = SCORES.get(q.device.type, MOST_SCORES)
    step = max(1, most_scores // (batch * heads * blocks))
    for low in range(0, q.shape[2], step):
        part = slice(low, low + step)
        end = rule.end(at[:, part, None])[:, None]
        finished = int(end.max()) if _asks(q) else blocks
        if finished <= rule.first:
            continue
        scores = probe[:, :, part] @ summaries[:, :, :finished].mT
        scores.masked_fill_(number[:finished] >= end, -torch.inf)
        scores[..., : rule.first] = -torch.inf
        best = scores.topk(min(most, finished), dim=3, sorted=False)
        chosen = torch.where(best.values > -torch.inf, best.indices, -1)
        found[:, :, part, : chosen.shape[3]] = chosen
    return found


def _asks(q: Tensor) -> bool:
    """Whether a number may be asked for: on a CPU, and not of a graph that is being made."""
    return q.device.type == "cpu" and not torch.compiler.is_compiling()


def far_keys(
    rule: Rule,
    at: Tensor,
    chosen: Tensor,
) -> Tensor:
    """Whether the query at position `at` sees each key of the chosen blocks because of them, (...,
    n, block) bool, for at (...) and chosen (..., n): it is neither in the window nor a sink."""
    key = chosen[..., None] * rule.block + torch.arange(rule.block, device=chosen.device)
    near = (at[..., None, None] - key < rule.window) | (key < rule.sinks)
    return (chosen >= 0)[..., None] & ~near
