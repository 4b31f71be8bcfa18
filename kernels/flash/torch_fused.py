"""Tiles of a pattern through the CPU's fused kernel: all tiles of one shape are the batch of one
call.

Their keys overlap: they are views, nothing is copied. Against the tile loop of `torch_blocks` on an
AVX2 core (window 512, 8 heads of 64, 4096 tokens) forward takes 80 instead of 110 ms, backward as
long; with more threads the loop waits for them ten times a tile, this once a call: it uses many
cores, and other jobs on the machine disturb it less.

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, D). A tile has S queries and L keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..overlapping import add_overlapping, computable, every
from ..rows import dense_rows
from .pattern import Blocks, Pattern
from .torch_blocks import Problem

# queries of a tile: how the kernel splits fewer than 192 itself, and the least that is computed in
# vain
FORWARD = 32
BACKWARD = 128  # more, since each tile's gradients of its L keys are added up afterwards
ROOM = 4 * 2**20  # elements of such gradients, or of masks that differ from tile to tile, at a time
# so few queries are one tile, for the whole batch at once: tiling saves less than its calls cost
SHORT = 128
SIDE = 1024  # queries against the side at a time
BLIND = 1e30  # the log-sum-exp that makes all weights 0


def fits(problem: Problem, q: Tensor, v: Tensor) -> bool:
    """Whether `forward` and `backward` can do it."""
    unlike = problem.softcap is not None or problem.drop is not None
    if q.device.type != "cpu" or unlike or q.shape[-1] != v.shape[-1]:
        return False
    return not problem.dense or problem.queries <= SHORT or _unmasked(problem)


def forward(problem: Problem, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k, v, q_first, k_side, v_side -> out (B, Hq, Tq, D) and the log-sum-exp (B, Hq, Tq), both
    fp32 (fp64 for fp64 inputs); 0 and -inf for queries that see no key."""
    work = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    q, k, v, q_first, k_side, v_side = computable(tensors)
    out, lse = (_whole if _at_once(problem) else _in_batches)(problem, q, k, v, work)
    for at, queries, cut, mask in _side_parts(problem, q, q_first, k_side):
        got, sums = _run(
            problem, queries[:, :, at], k_side[:, :, cut], v_side[:, :, cut], mask=mask
        )
        sums = torch.where(mask.amax(dim=-1) == -torch.inf, -torch.inf, sums.to(work))
        merge(out[:, :, at], lse[:, :, at], got.to(work), sums)
    return out, lse


def merge(out: Tensor, lse: Tensor, more: Tensor, sums: Tensor) -> None:
    """Makes out (..., D) and lse the softmax over their keys and those of `more` and its
    log-sum-exp.
    """
    torch.logaddexp(lse, sums, out=lse)
    share = (sums - lse).exp_().nan_to_num_(0)[..., None]  # NaN: neither part saw a key
    out.lerp_(more, share)


def _whole(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, work: torch.dtype
) -> tuple[Tensor, Tensor]:
    causal, mask, blind = _one_mask(problem, q)
    out, lse = (x.to(work) for x in _run(problem, q, k, v, causal, mask))
    if blind is None:
        return out, lse
    # What the kernel returns for them is not documented.
    return out.masked_fill_(blind, 0), lse.masked_fill(blind[..., 0], -torch.inf)


def _in_batches(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, work: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty(q.shape, dtype=work), q.new_empty(q.shape[:3], dtype=work)
    for row in range(q.shape[0]):
        for at, keys, mask, blind in _batches(problem, row, FORWARD, q):
            outs, sums = every(out[row], *at), every(lse[row, ..., None], *at)
            if mask is None:
                outs.fill_(0), sums.fill_(-torch.inf)
                continue
            got = _run(
                problem,
                every(q[row], *at),
                every(k[row], *keys),
                every(v[row], *keys),
                mask=mask,
            )
            outs.copy_(got[0])
            sums.copy_(got[1][..., None])
            if blind is not None:
                outs.masked_fill_(blind, 0)
                sums.masked_fill_(blind, -torch.inf)
    return out, lse


def backward(
    problem: Problem, tensors, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
):
    """Gradients of q, k, v, q_first, k_side, v_side, fp32 or fp64."""
    dim = tensors[0].shape[-1]
    shapes = [None if x is None else x.shape for x in tensors]
    q, k, v, q_first, k_side, v_side = computable(tensors)
    lse = torch.where(lse == -torch.inf, BLIND, lse)
    if d_lse is not None:
        # The kernel subtracts rowsum(d_out * out) from d_out v^T; the gradient of the log-sum-exp
        # is to be added. One more column does it: v's is 0, d_out's 1 and out's the gradient's
        # negative. Eight, for alignment.
        d_lse = d_lse.masked_fill(lse == BLIND, 0)[..., None]
        q, k, v, q_first, k_side, v_side = (
            None if x is None else pad(x, (0, 8)) for x in (q, k, v, q_first, k_side, v_side)
        )
        d_out = pad(torch.cat([d_out, torch.ones_like(d_lse)], dim=-1), (0, 7))
        out = pad(torch.cat([out, -d_lse], dim=-1), (0, 7))
    d_out, out = (dense_rows(x.to(q.dtype)) for x in (d_out, out))
    work = lse.dtype
    dq, dk, dv, dq_first, dk_side, dv_side = (
        None if x is None else torch.zeros(x.shape, dtype=work)
        for x in (q, k, v, q_first, k_side, v_side)
    )
    if _at_once(problem):
        dq, dk, dv = (
            x.to(work)
            for x in _run_back(problem, d_out, q, k, v, out, lse, *_one_mask(problem, q)[:2])
        )
    else:
        for row in range(q.shape[0]):
            for at, keys, mask, _ in _batches(problem, row, BACKWARD, q, gradients=True):
                if mask is None:
                    continue
                mine = [every(x[row], *at) for x in (d_out, q, out, lse[..., None])]
                others = [every(x[row], *keys) for x in (k, v)]
                got = _run_back(
                    problem, mine[0], mine[1], *others, mine[2], mine[3][..., 0], mask=mask
                )
                every(dq[row], *at).copy_(got[0])
                add_overlapping(dk[row], got[1], *keys)
                add_overlapping(dv[row], got[2], *keys)
    for at, queries, cut, mask in _side_parts(problem, q, q_first, k_side):
        inputs = (
            queries[:, :, at],
            k_side[:, :, cut],
            v_side[:, :, cut],
            out[:, :, at],
            lse[:, :, at],
        )
        got = _run_back(problem, d_out[:, :, at], *inputs, mask=mask)
        (dq if queries is q else dq_first)[:, :, at] += got[0]
        dk_side[:, :, cut] += got[1]
        dv_side[:, :, cut] += got[2]
    grads = dq, dk, dv, dq_first, dk_side, dv_side
    return [
        None if x is None else x[..., :dim].reshape(shape)
        for x, shape in zip(grads, shapes, strict=True)
    ]


# The kernel
# -------------------------------------------------------------------------------------------------


# These are what `scaled_dot_product_attention` runs on a CPU; they alone return and take the
# log-sum-exp. Masks are added to the scores.
def _run(
    problem: Problem, q, k, v, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return run(q, k, v, 0.0, causal, attn_mask=mask, scale=problem.scale)


def _run_back(
    problem: Problem, d_out, q, k, v, out, lse, causal: bool = False, mask: Tensor | None = None
):
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return run(d_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=problem.scale)


# One tile
# -------------------------------------------------------------------------------------------------


def _at_once(problem: Problem) -> bool:
    return problem.keys > 0 and (problem.dense or problem.queries <= SHORT)


def _unmasked(problem: Problem) -> bool:
    """Whether the kernel needs no mask for it: dense, and if causal then with a query at every
    key.
    """
    square = (
        problem.queries == problem.keys and problem.first_query - problem.lag == problem.first_key
    )
    return problem.dense and problem.hidden is None and (square or not problem.causal)


def _one_mask(problem: Problem, like: Tensor) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether the kernel is to be causal, the mask (1 or B, 1, Tq, Tk), and the queries that see no
    key (1 or B, 1, Tq, 1); None where all is seen."""
    if _unmasked(problem):
        return problem.causal, None, None
    mask = like.new_zeros(1, 1, problem.queries, problem.keys)
    for c0, c1, added in problem.strips(0, problem.queries, 0, problem.keys, like):
        mask[..., c0:c1] = added
    if problem.hidden is not None:
        mask = mask.masked_fill(problem.hidden[:, None, None], -torch.inf)
    return False, mask, mask.amax(dim=-1, keepdim=True) == -torch.inf


# Tiles that look alike
# -------------------------------------------------------------------------------------------------


def _batches(
    problem: Problem, row: int, step: int, like: Tensor, gradients: bool = False
) -> Iterator[tuple]:
    """For one row of the batch: where `every` finds the tiles' queries, where their keys, the mask
    (1 or count, 1, S, L) or None where no key is in reach, and the queries that see none (count, 1,
    S, 1) or None."""
    pattern, hidden = problem.pattern, problem.hidden
    if hidden is not None:
        hidden = hidden[row if hidden.shape[0] > 1 else 0]
        hidden = hidden if bool(hidden.any()) else None
    bias = (
        None
        if hidden is None
        else like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[None, :, None]
    )
    step = min(step, pattern.size) if isinstance(pattern, Blocks) else step
    for (a, b, k0, k1), tiles, stride in _series(list(problem.tiles(step)), pattern):
        if k1 == k0:
            yield (a, b - a, tiles, stride), None, None, None
            continue
        strips = like.new_zeros(1, 1, b - a, k1 - k0)
        for c0, c1, added in problem.strips(a, b, k0, k1, like):
            strips[..., c0:c1] = added
        each = max((b - a) * (bias is not None), like.shape[1] * like.shape[3] * gradients) * (
            k1 - k0
        )
        most = max(1, ROOM // each) if each else tiles
        for done in range(0, tiles, most):
            count, ahead = min(most, tiles - done), done * stride
            keys = k0 + ahead, k1 - k0, count, stride
            mask, blind = strips, None
            if bias is not None:
                mask = strips + every(bias, *keys).transpose(-1, -2)
            # not even itself
            if bias is not None or problem.lag or problem.first_query < problem.first_key:
                blind = mask.amax(dim=-1, keepdim=True) == -torch.inf
            yield (a + ahead, b - a, count, stride), keys, mask, blind


def _series(tiles: list[tuple[int, int, int, int]], pattern: Pattern) -> Iterator[tuple]:
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


def _side_parts(
    problem: Problem, q: Tensor, q_first: Tensor | None, k_side: Tensor | None
) -> Iterator[tuple]:
    """Queries (a slice), which ones (q or q_first), the side's keys that those see (a slice), and
    the mask.
    """
    if k_side is None:
        return
    count = k_side.shape[2]
    first = 0 if q_first is None else min(problem.side.first, count)
    for a in range(0, problem.queries, SIDE):
        b = min(a + SIDE, problem.queries)
        bias = problem.side_bias(a, b, q.dtype)[:, None]
        for queries, p0, p1 in ((q_first, 0, first), (q, first, count)):
            if p1 > p0:
                yield slice(a, b), queries, slice(p0, p1), bias[..., p0:p1]
