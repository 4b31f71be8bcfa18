"""Gated linear attention and the gated delta rule on Triton: the launch, and its tiles. The
backward pass is that of the torch path, which makes its products again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..flash.tiles import architecture, padded
from ..flash.triton_impl import DTYPES
from ..launching import launch
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv
from ..rows import dense_rows
from . import torch_impl, triton_kernels
from .gates import BY_FEATURE, HALF

MOST = 512  # features of a head


def constants(
    arch: str, features: int, value_dim: int, normalize: bool, by_feature: bool
) -> dict[str, Any]:
    """The compile-time arguments of a launch, num_warps and num_stages among them. ValueError for
    more features than there is room for."""
    block_f = padded(features)
    if block_f > MOST:
        raise ValueError(f"features: got {features} of a head, valid are 1 to {MOST}")
    # the sums lie in registers, beside a chunk of keys, whose decays differ by feature
    room = 16 if block_f > (128 if arch == "gfx942" else 256) else 32 if block_f > 64 else 64
    block_v = min(padded(value_dim), room)
    fixed = dict(F=features, V=value_dim, NORMALIZE=normalize, BY_FEATURE=by_feature)
    fixed |= dict(HALF=HALF, C=BY_FEATURE, BLOCK_F=block_f, BLOCK_V=block_v)
    if arch == "interpreted":
        return fixed | dict(num_warps=1, num_stages=1)
    return fixed | dict(num_warps=4 if block_f <= 128 else 8, num_stages=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    beta: Tensor | None,
    normalize: bool,
    mask: Tensor | None,
    scale: float,
    memory: tuple[Tensor, Tensor | None, Tensor | None] | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `effattn.kernels.gated.attention`. fp16, bf16 or fp32; ValueError otherwise."""
    if k.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {k.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    first = (None, None) if memory is None else memory[:2]
    return _Attention.apply(q, k, v, log_decay, beta, *first, mask, normalize, scale, keep)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, first, first_norms, mask, normalize, scale, keep):
        ctx.save_for_backward(q, k, v, log_decay, beta, first, first_norms, mask)
        ctx.options = dict(normalize=normalize, scale=scale, keep=keep)
        ctx.set_materialize_grads(False)
        return _launch(q, k, v, log_decay, beta, first, first_norms, mask, normalize, scale, keep)

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, *grads):
        *given, mask = ctx.saved_tensors
        wanted = [number for number, x in enumerate(given) if ctx.needs_input_grad[number]]
        with torch.enable_grad():
            given = [None if x is None else x.detach().requires_grad_() for x in given]
            q, k, v, log_decay, beta, first, norms = given
            found = torch_impl.attention(
                q,
                k,
                v,
                log_decay=log_decay,
                beta=beta,
                mask=mask,
                memory=None if first is None else (first, norms, None),
                **ctx.options,
            )
        pairs = [
            (x, grad)
            for x, grad in zip(found, grads, strict=True)
            if x is not None and grad is not None and x.requires_grad
        ]
        own = torch.autograd.grad(
            [x for x, _ in pairs],
            [given[number] for number in wanted],
            [grad.to(x.dtype) for x, grad in pairs],
            allow_unused=True,
        )
        out = [None] * len(ctx.needs_input_grad)
        for number, grad in zip(wanted, own, strict=True):
            out[number] = grad
        return tuple(out)


def _launch(q, k, v, log_decay, beta, first, first_norms, mask, normalize, scale, keep):
    """out, and with `keep` the sums and norms after all tokens."""
    (batch, heads, tokens, features), value_dim = k.shape, v.shape[3]
    queries, group = q.shape[2], q.shape[1] // heads
    q, k, v, mask = map(dense_rows, (q, k, v, mask))
    gate, beta, first, first_norms = (
        None if x is None else x.float().contiguous() for x in (log_decay, beta, first, first_norms)
    )
    by_feature = gate is not None and gate.shape[3] > 1
    fixed = constants(architecture(k.device), features, value_dim, normalize, by_feature)
    out = q.new_empty(batch, heads * group, queries, value_dim)
    last = last_norms = None
    if keep:
        last = torch.empty(batch, heads, features, value_dim, device=k.device)
        last_norms = torch.empty(batch, heads, features, device=k.device) if normalize else None
    strides = [step for x in (q, k, v) for step in x.stride()[:3]]
    grid = batch * heads * cdiv(value_dim, fixed["BLOCK_V"]), 1, 1
    with torch.cuda.device_of(k):
        tensors = q, k, v, gate, beta, mask, first, first_norms, out, last, last_norms
        steps = *strides, 0 if mask is None else mask.stride(0)
        numbers = scale, heads, group, tokens, queries
        launch(triton_kernels.forward, grid, (*tensors, *steps, *numbers), fixed)
    return out, last, last_norms
