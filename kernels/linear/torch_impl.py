"""Linear attention in plain torch, forward and backward, at linear cost and with features for one
block at a time: T x F is never held, T x T even less. Causal in chunks (`torch_causal`),
bidirectional in two loops (`torch_bidirectional`).

Shapes: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, V), phi (., ., T, F) of F features; sums
S (B, Hkv, F, V) and n (B, Hkv, F)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given
from . import step, torch_bidirectional, torch_causal
from .torch_parts import Spec, Sums

CHUNK = 64


def attention(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    *,
    directions: Tensor | None,
    mask: Tensor | None,
    decay: Tensor | None,
    normalize: bool,
    causal: bool,
    factors: tuple[float, float],
    gain: float,
    memory: tuple[Tensor, Tensor | None, Tensor | None] | None,
    keep: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`effattn.kernels.linear.attention` and `fold` (q None): out, and with `keep` the memory's
    sums, norms and top.
    """
    if causal and q is not None and q.shape[2] == 1 and not keep and k.shape[2] <= CHUNK:
        given = (q, k, v, *(memory or ()))
        if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in given):
            return _step(
                q, k, v, memory, directions, mask, decay, normalize, factors, gain, feature_map
            )
    spec = Spec(feature_map, factors, normalize, causal, gain, keep, CHUNK)
    return _Attention.apply(q, k, v, *(memory or (None, None, None)), directions, mask, decay, spec)


def _step(q, k, v, memory, directions, mask, decay, normalize, factors, gain, feature_map):
    """One query over a memory and a few keys."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    keys = k.shape[2]
    age = None if decay is None else torch.arange(keys - 1, -1, -1, device=k.device)
    options = step.Options(feature_map, directions, decay, normalize, factors, gain, dtype)
    return step.read(q, k, v, memory, mask, age, keys, options), None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sums, norms, top, directions, mask, decay, spec):
        ctx.spec, ctx.had_memory = spec, sums is not None
        ctx.set_materialize_grads(False)
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        out = None if q is None else q.new_empty(*q.shape[:3], v.shape[3])
        dens = None  # one over the normaliser, for backward
        if q is not None and spec.normalize and any(ctx.needs_input_grad):
            dens = q.new_empty(q.shape[:3], dtype=dtype)
        if spec.causal:
            ctx.parts, ctx.starts, ends = torch_causal.batches(q, k, spec, directions), [], []
            for rows in ctx.parts:
                call = torch_causal.Call(q, k, v, directions, mask, decay, spec, rows, dtype)
                end, start = call.forward(
                    call.start(sums, norms, top), out, dens, keep=any(ctx.needs_input_grad)
                )
                ends.append(end)
                ctx.starts.append(start)
            end = Sums(
                *(None if xs[0] is None else torch.cat(xs) for xs in zip(*ends, strict=True))
            )
        else:
            call = torch_bidirectional.Call(q, k, v, directions, mask, spec, dtype)
            end = torch_bidirectional.gather(call, (sums, norms, top))
            torch_bidirectional.read(call, end, out, dens)
            ctx.starts = end
        ctx.save_for_backward(q, k, v, directions, mask, decay, out, dens, top)
        if not spec.keep:
            return out, None, None, None
        if end.top is not None:
            ctx.mark_non_differentiable(end.top)
        return out, *end

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad, grad_sums, grad_norms, _):
        q, k, v, directions, mask, decay, out, dens, top = ctx.saved_tensors
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        if q is not None and grad is None:
            grad = torch.zeros_like(out)
        dq, dk, dv = (None if x is None else torch.empty_like(x) for x in (q, k, v))
        if ctx.spec.causal:
            first = []
            for rows, starts in zip(ctx.parts, ctx.starts, strict=True):
                call = torch_causal.Call(q, k, v, directions, mask, decay, ctx.spec, rows, dtype)
                last = call.last(grad_sums, grad_norms)
                first.append(call.backward(starts, last, out, dens, grad, dq, dk, dv)[:2])
            d_sums, d_norms = (
                None if xs[0] is None else torch.cat(xs) for xs in zip(*first, strict=True)
            )
        else:
            call = torch_bidirectional.Call(q, k, v, directions, mask, ctx.spec, dtype)
            d_sums, d_norms = torch_bidirectional.backward(
                call, ctx.starts, top, out, dens, grad, grad_sums, grad_norms, dq, dk, dv
            )
        if not ctx.had_memory:
            d_sums = d_norms = None
        return dq, dk, dv, d_sums, d_norms, None, None, None, None, None
