"""Tiles of a pattern through the CPU's fused kernel, forward only: all tiles of one shape are the batch of one call.

Their keys overlap: they are views, nothing is copied. Against the tile loop of `torch_blocks` on an AVX2 core (window
512, 8 heads of 64, 4096 tokens) it takes 80 instead of 110 ms, and with several threads it waits for them once a call
and not ten times a tile, which matters as soon as anything else runs on the machine.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, D). A tile has S queries and L keys.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .pattern import Blocks, Pattern
from .torch_blocks import Problem

QUERIES = 32  # of a tile: how the kernel itself splits fewer than 192


def fits(problem: Problem, q: Tensor, v: Tensor) -> bool:
    """Whether `forward` can do it."""
    if q.device.type != "cpu" or problem.softcap is not None or q.shape[-1] != v.shape[-1]:
        return False
    if type(problem.pattern) is not Pattern:
        return True
    square = problem.queries == problem.keys and problem.first_query == problem.first_key
    return (square or not problem.causal) and problem.hidden is None and problem.side is None


def forward(problem: Problem, q, k, v, q_first, k_side, v_side) -> tuple[Tensor, Tensor]:
    """-> out (B, Hq, Tq, D) and the log-sum-exp (B, Hq, Tq), both fp32 (fp64 for fp64 inputs); 0 and -inf for queries
    that see no key."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and not _bf16_units()):  # emulated: twice as slow as fp32
        q, k, v, q_first, k_side, v_side = (
            None if x is None else x.float() for x in (q, k, v, q_first, k_side, v_side)
        )
    if type(problem.pattern) is Pattern:
        out, lse = _run(q, k, v, problem, causal=problem.causal)
        return out.to(work), lse.to(work)
    out, lse = q.new_empty(q.shape, dtype=work), q.new_empty(q.shape[:3], dtype=work)
    for row in range(q.shape[0]):
        hidden = None
        if problem.hidden is not None:
            hidden = problem.hidden[row if problem.hidden.shape[0] > 1 else 0]
            hidden = hidden if bool(hidden.any()) else None
        _row(problem, q[row], k[row], v[row], hidden, out[row], lse[row])
    if problem.side is not None:
        _add_side(problem, q, q_first, k_side, v_side, out, lse)
    return out, lse


def _bf16_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _run(q: Tensor, k: Tensor, v: Tensor, problem: Problem, causal: bool = False, mask: Tensor | None = None):
    """The kernel behind `scaled_dot_product_attention`, which alone returns the log-sum-exp; mask is added."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return run(q, k, v, 0.0, causal, attn_mask=mask, scale=problem.scale)


def _row(problem: Problem, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """One row of the batch, without the side: q (Hq, Tq, D), k, v (Hkv, Tk, D), hidden (Tk,)."""
    pattern = problem.pattern
    step = min(QUERIES, pattern.size) if isinstance(pattern, Blocks) else QUERIES
    bias = None if hidden is None else q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[None, :, None]
    for (a, b, k0, k1), count, stride in _series(list(problem.tiles(step)), pattern):
        if k1 == k0:
            for tile in range(count):
                at = slice(a + tile * stride, b + tile * stride)
                out[:, at], lse[:, at] = 0, -torch.inf
            continue
        queries, outs, sums = (_every(x, a, b - a, count, stride) for x in (q, out, lse[..., None]))
        keys, values = (_every(x, k0, k1 - k0, count, stride) for x in (k, v))
        mask = q.new_zeros(1, 1, b - a, k1 - k0)
        for c0, c1, added in problem.strips(a, b, k0, k1, q):
            mask[..., c0:c1] = added
        if bias is not None:
            mask = mask + _every(bias, k0, k1 - k0, count, stride).transpose(-1, -2)  # (count, 1, S, L)
        got, got_sums = _run(queries, keys, values, problem, mask=mask)
        outs.copy_(got)
        sums.copy_(got_sums[..., None])
        if bias is not None:  # what the kernel returns for queries without keys is not documented
            blind = mask.amax(dim=-1, keepdim=True) == -torch.inf
            outs.masked_fill_(blind, 0)
            sums.masked_fill_(blind, -torch.inf)


def _every(x: Tensor, at: int, size: int, count: int, stride: int) -> Tensor:
    """(H, T, D) -> (count, H, size, D): `size` tokens from `at`, from at + stride, ..."""
    head, token, one = x.stride()
    return x.as_strided(
        (count, x.shape[0], size, x.shape[2]), (stride * token, head, token, one), x.storage_offset() + at * token
    )


def _series(tiles: list[tuple[int, int, int, int]], pattern: Pattern):
    """(first tile, how many, tokens from one to the next) of tiles that look alike."""
    alike: dict[tuple, list] = {}
    for tile in tiles:
        a, b, k0, k1 = tile
        place = a % pattern.size if isinstance(pattern, Blocks) else 0  # in its block
        alike.setdefault((b - a, k1 - k0, a - k0, place), []).append(tile)
    for same in alike.values():
        strides = {other[0] - one[0] for one, other in pairwise(same)}
        if len(strides) > 1:
            yield from ((tile, 1, 0) for tile in same)
        else:
            yield same[0], len(same), strides.pop() if strides else 0


def _add_side(problem: Problem, q, q_first, k_side, v_side, out: Tensor, lse: Tensor) -> None:
    """Merges the side's keys into `out` and `lse`, by their log-sum-exps. In blocks of queries, so that it stays in
    the cache."""
    count, first = k_side.shape[2], 0 if q_first is None else min(problem.side.first, k_side.shape[2])
    for a in range(0, problem.queries, 1024):
        b = min(a + 1024, problem.queries)
        bias = problem.side_bias(a, b, q.dtype)
        for queries, p0, p1 in ((q_first, 0, first), (q, first, count)):
            if p0 == p1:
                continue
            mask = bias[:, None, :, p0:p1]
            got, sums = _run(queries[:, :, a:b], k_side[:, :, p0:p1], v_side[:, :, p0:p1], problem, mask=mask)
            sums = torch.where(mask.amax(dim=-1) == -torch.inf, -torch.inf, sums.to(lse.dtype))
            lse[:, :, a:b] = torch.logaddexp(lse[:, :, a:b], sums)
            share = (sums - lse[:, :, a:b]).exp_().nan_to_num_(0)[..., None]  # NaN: neither part saw a key
            out[:, :, a:b].lerp_(got.to(out.dtype), share)
