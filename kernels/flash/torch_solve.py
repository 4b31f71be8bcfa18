"""One softmax over the keys of one problem, or of several that share them out: forward, and
backward.

The outputs of several problems are merged by their log-sum-exps, which is exact. Backward gives
each of them the output and the log-sum-exp of the whole: then its weights, and with them its
gradients, are those of the whole.

A problem is solved by `torch_fused` where it can be, which is faster, and by `torch_blocks`.

Shapes: q, out, d_out (B, Hq, Tq, .), k, v (B, Hkv, Tk, .), lse (B, Hq, Tq).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given
from . import torch_blocks, torch_fused
from .torch_blocks import Problem


class Piece(NamedTuple):
    """q, k, v, q_first, keys and values of the side, biases by distance; q (B, Hq, T, D) the last
    ones of the call.
    """

    problem: Problem
    tensors: tuple[Tensor | None, ...]


TENSORS = 7


def solve(pieces: list[Piece], need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(B, Hq, Tq, Dv) in q's dtype and the log-sum-exp (B, Hq, Tq). The first piece has all of the
    queries.
    """
    problems, tensors = [problem for problem, _ in pieces], [x for _, some in pieces for x in some]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, lse = _Attention.apply(problems, *tensors)
    else:
        out, lse = _forward(problems, tensors)
        out = out.to(tensors[0].dtype)
    return out, lse if need_lse else None


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; backward computes the weights again."""

    @staticmethod
    def forward(ctx, problems, *tensors):
        out, lse = _forward(problems, tensors)
        ctx.problems = problems
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        return out.to(tensors[0].dtype), lse

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, d_out, d_lse):
        *tensors, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype)
        found = []
        for n, problem in enumerate(ctx.problems):
            some = tensors[TENSORS * n : TENSORS * (n + 1)]
            whole = [
                x if x is None else x[:, :, -problem.queries :] for x in (out, lse, d_out, d_lse)
            ]
            grads = _backward(
                problem, some, *whole, learned=ctx.needs_input_grad[TENSORS * (n + 1)]
            )
            found += [
                None if x is None or grad is None else grad.reshape(x.shape).to(x.dtype)
                for x, grad in zip(some, grads, strict=True)
            ]
        return None, *found


def _forward(problems: list[Problem], tensors) -> tuple[Tensor, Tensor]:
    """-> (B, Hq, Tq, Dv) and (B, Hq, Tq), both fp32 or fp64."""
    out, lse = _forward_one(problems[0], tensors[:TENSORS])
    for n, problem in enumerate(problems[1:], 1):
        rows = slice(-problem.queries, None)
        more, sums = _forward_one(problem, tensors[TENSORS * n : TENSORS * (n + 1)])
        torch_fused.merge(out[:, :, rows], lse[:, :, rows], more, sums)
    return out, lse


def _forward_one(problem: Problem, tensors) -> tuple[Tensor, Tensor]:
    q, _, v, *_, table = tensors
    if table is None and torch_fused.fits(problem, q, v):
        out, lse = torch_fused.forward(problem, *tensors[:-1])
    else:
        out, lse = torch_blocks.forward(problem, *_worked(tensors))
        out, lse = out.view(*q.shape[:3], v.shape[-1]), lse.view(q.shape[:3])
    # padding on the left; causal, it saw nothing anyway
    if problem.start is not None and not problem.causal:
        number = torch.arange(
            problem.first_query, problem.first_query + problem.queries, device=q.device
        )
        blind = (number < problem.start[:, None])[:, None]
        out, lse = out.masked_fill_(blind[..., None], 0), lse.masked_fill_(blind, -torch.inf)
    return out, lse


def _backward(
    problem: Problem, tensors, out, lse, d_out, d_lse, learned: bool
) -> list[Tensor | None]:
    """The gradients of `tensors`, in shapes of as many elements; the biases' only if `learned`."""
    q, k, v, *_, table = tensors
    if table is None and torch_fused.fits(problem, q, v):
        return [*torch_fused.backward(problem, tensors[:-1], out, lse, d_out, d_lse), None]
    flat = [None if x is None else _flat(x, k.shape[1]) for x in (out, lse, d_out, d_lse)]
    return torch_blocks.backward(problem, *_worked(tensors), *flat, learned=learned)


def _flat(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, T, ...) -> (B * Hkv, G, T, ...)"""
    return x.reshape(x.shape[0] * kv_heads, x.shape[1] // kv_heads, *x.shape[2:])


def _worked(tensors) -> list[Tensor | None]:
    """As `torch_blocks` takes them: at least fp32, since half precision on a CPU without units for
    it is emulated (a bf16 product runs at 1 GFLOP/s, an fp32 one at 150), and so that scores are
    not rounded; heads flat."""
    work = torch.promote_types(tensors[0].dtype, torch.float32)
    q, k, v, q_first, k_side, v_side, table = (x if x is None else x.to(work) for x in tensors)
    kv_heads = k.shape[1]
    queries = [None if x is None else _flat(x, kv_heads) for x in (q, q_first)]
    others = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in (k, v, k_side, v_side)]
    return [queries[0], *others[:2], queries[1], *others[2:], table]
