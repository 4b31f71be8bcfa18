"""How learned summaries learn, though choosing has no gradient: a loss of their own, which rides on
the output.

The scores of the candidates are held to the attention that they really have (as DeepSeek's indexer
learns, DSA): KL(mass of each block || softmax of its score). Dense attention is computed for it, so
a training step costs O(T^2).

B: rows; Hq, H: query and key/value heads; T: keys; Tq: queries; N: blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import Rule, probes, summarise, work_dtype

QUERIES = 256  # at a time


class _Riding(torch.autograd.Function):
    """The output as it is; the loss gets the gradient 1 whatever becomes of the output."""

    @staticmethod
    def forward(ctx, out, loss):
        ctx.loss = loss.shape, loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, device = ctx.loss
        return grad, torch.ones(shape, dtype=dtype, device=device)


def with_pool_loss(
    out: Tensor, q: Tensor, k: Tensor, rule: Rule, pool: Tensor, at: Tensor, *, scale: float
) -> Tensor:
    """`out`, whose backward pass adds the gradient of `pool_loss` to that of `pool`."""
    return _Riding.apply(
        out,
        pool_loss(
            q,
            k,
            rule,
            pool,
            at,
            scale=scale,
        ),
    )


def pool_loss(
    q: Tensor, k: Tensor, rule: Rule, pool: Tensor, at: Tensor, *, scale: float
) -> Tensor:
    """0-d, in nats: the mean over queries that have a choice of the KL divergence between the
    attention that their candidates have (of all heads of a group together) and softmax(scale score
    / G).

    q (B, Hq, Tq, D), k (B, H, T, D) from each row's first real token on, pool (H, D), at (1 or B,
    Tq)."""
    q, k, heads = q.detach(), k.detach(), k.shape[1]
    summaries = summarise(rule, k, pool)
    group, blocks = q.shape[1] // heads, summaries.shape[2]
    keys = k[:, :, : blocks * rule.block].to(work_dtype(k)).repeat_interleave(group, dim=1)
    number, lowest = torch.arange(blocks, device=q.device), torch.finfo(keys.dtype).min
    total, counted = summaries.sum() * 0, 0
    for low in range(0, q.shape[2], QUERIES):
        some = q[:, :, low : low + QUERIES].to(keys.dtype)
        may = rule.candidates(at[:, low : low + QUERIES, None], number)[:, None]
        with torch.no_grad():
            scores = some @ keys.mT * scale
            hidden = ~may.repeat_interleave(rule.block, dim=3)
            mass = torch.softmax(scores.masked_fill(hidden, lowest), dim=3)
            mass = mass.unflatten(3, (blocks, rule.block)).sum(dim=4)
            mass = mass.unflatten(1, (heads, group)).mean(dim=2).masked_fill(~may, 0)
        found = probes(rule, some, heads) @ summaries.mT * (scale / group)
        found = torch.log_softmax(found.masked_fill(~may, lowest), dim=3)
        chance = torch.where(mass > 0, mass * (mass.clamp(min=1e-30).log() - found), 0.0)
        choice = may.sum(dim=3) > 1
        total = total + (chance.sum(dim=3) * choice).sum()
        counted = counted + choice.expand(q.shape[0], heads, -1).sum()
    return total / (counted if isinstance(counted, int) else counted.clamp(min=1))
