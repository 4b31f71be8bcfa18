"""Codebook attention in plain torch: matrix products over one block of queries at a time. No (T, T)
scores exist.

Scores are computed again in the backward pass.

Shapes: q (B, Hkv G, T, D), G query heads to a K/V head; codebook (Hkv, S, D) of S words; sums
(B, Hkv, N, S, Dv) and counts (B, Hkv, N, S) of N blocks of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given

CHUNK = 1024  # keys that are compared with the codebook at a time


def nearest(k: Tensor, codebook: Tensor) -> Tensor:
    """As `effattn.kernels.vq.nearest`: the most of k c - |c|^2 / 2."""
    codebook = codebook.to(torch.promote_types(k.dtype, torch.float32))
    offset = codebook.square().sum(-1)[:, None] / 2
    parts = [
        (part.to(codebook.dtype) @ codebook.mT - offset).argmax(-1)
        for part in k.split(CHUNK, dim=2)
    ]
    return torch.cat(parts, dim=2)


def summarise(
    v: Tensor, codes: Tensor, words: int, real: Tensor | None, size: int, first: int
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.vq.summarise`."""
    batch, heads, tokens, dim = v.shape
    base, blocks = first // size, (first + tokens - 1) // size - first // size + 1
    block = torch.arange(first, first + tokens, device=v.device) // size - base
    row = torch.arange(batch * heads, device=v.device).view(batch, heads, 1)
    at = ((row * blocks + block) * words + codes).flatten()
    values = v.to(torch.promote_types(v.dtype, torch.float32))
    ones = torch.ones_like(codes, dtype=torch.int32)
    if real is not None:
        values = torch.where(real[:, None, :, None], values, 0.0)
        ones = ones * real[:, None]
    sums = values.new_zeros(batch * heads * blocks * words, dim).index_add_(
        0, at, values.reshape(-1, dim)
    )
    counts = ones.new_zeros(len(sums)).index_add_(0, at, ones.flatten())
    return sums.view(batch, heads, blocks, words, dim), counts.view(batch, heads, blocks, words)


def read(
    q: Tensor, codebook: Tensor, sums: Tensor, counts: Tensor, scale: float, size: int, first: int
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.vq.read`."""
    return _Read.apply(q, codebook, sums, counts, scale, size, first)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, codebook, sums, counts, scale, size, first):
        batch, heads, tokens, _ = q.shape
        work = torch.promote_types(q.dtype, torch.float32)
        codebook = codebook.to(work)
        out = q.new_empty(batch, heads, tokens, sums.shape[-1])
        lse = q.new_empty(batch, heads, tokens, dtype=work)
        for block, at in _blocks(tokens, size, first):
            rows, log_counts, means = _rows(q, at, codebook, work), *_means(sums, counts, block)
            scores = torch.add(log_counts, rows @ codebook.mT, alpha=scale)
            top = scores.amax(dim=-1, keepdim=True)
            blind = top == -torch.inf
            weights = scores.sub_(top.masked_fill_(blind, 0.0)).exp_()
            total = weights.sum(dim=-1, keepdim=True).masked_fill_(blind, 1.0)
            got = (weights @ means).div_(total)
            out[:, :, at] = got.view(batch, heads, -1, got.shape[-1])
            lse[:, :, at] = (
                (top + total.log()).masked_fill_(blind, -torch.inf).view(batch, heads, -1)
            )
        ctx.save_for_backward(q, codebook, sums, counts, out, lse)
        ctx.numbers = scale, size, first
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, d_out, d_lse):
        q, codebook, sums, counts, out, lse = ctx.saved_tensors
        scale, size, first = ctx.numbers
        work = lse.dtype
        d_out = torch.zeros_like(out) if d_out is None else d_out
        # what all codes of a query have in common in d score / weight
        shared = (out.to(work) * d_out).sum(-1)
        shared = shared if d_lse is None else shared - d_lse
        blind = lse == -torch.inf
        lse, shared = (
            lse.masked_fill(blind, torch.inf)[..., None],
            shared.masked_fill(blind, 0.0)[..., None],
        )
        dq, d_sums = torch.empty_like(q), torch.zeros_like(sums)
        for block, at in _blocks(q.shape[2], size, first):
            log_counts, means = _means(sums, counts, block)
            rows, grads, sums_of, own = (
                _rows(x, at, codebook, work) for x in (q, d_out, lse, shared)
            )
            weights = torch.add(log_counts, rows @ codebook.mT, alpha=scale).sub_(sums_of).exp_()
            d_sums[:, :, block] = (weights.mT @ grads) / counts[:, :, block].clamp(min=1)[..., None]
            slopes = (grads @ means.mT).sub_(own).mul_(weights)
            dq[:, :, at] = (slopes @ codebook).mul_(scale).view(*q.shape[:2], -1, q.shape[3])
        return dq, None, d_sums, None, None, None, None


def _blocks(tokens: int, size: int, first: int):
    """(number of the block, slice of the queries in it), blocks counted from the first query's."""
    for block in range((first + tokens - 1) // size - first // size + 1):
        border = (first // size + block) * size - first
        yield block, slice(max(border, 0), min(border + size, tokens))


def _rows(x: Tensor, at: slice, codebook: Tensor, work: torch.dtype) -> Tensor:
    """(B, Hq, T, ...) -> (B, Hkv, G * some tokens, ...)"""
    return x[:, :, at].to(work).unflatten(1, (len(codebook), -1)).flatten(2, 3)


def _means(sums: Tensor, counts: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A block's log counts (B, Hkv, 1, S) and mean values (B, Hkv, S, Dv)."""
    counts = counts[:, :, block].to(sums.dtype)
    return counts.log()[:, :, None], sums[:, :, block] / counts.clamp(min=1)[..., None]
