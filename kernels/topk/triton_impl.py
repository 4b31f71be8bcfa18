"""Attention to chosen blocks on Triton: the launches, and the tiles they run with. See
`triton_kernels` for the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..flash.tiles import WIDEST, architecture, padded
from ..flash.triton_impl import DTYPES
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from . import triton_kernels
from .selection import Rule

LOG2E = math.log2(math.e)


def constants(
    kernel: str, arch: str, dtype: torch.dtype, dim: int, value_dim: int, group: int
) -> dict[str, Any]:
    """The compile-time arguments of a launch, num_warps and num_stages among them. ValueError for
    heads wider than flash attention takes."""
    block_d, block_v = padded(dim), padded(value_dim)
    width = max(block_d, block_v)
    if width > WIDEST:
        raise ValueError(f"head size: got {max(dim, value_dim)}, valid are 1 to {WIDEST}")
    wide = width > 128 or dtype == torch.float32
    fixed = dict(D=dim, V=value_dim, BLOCK_D=block_d, BLOCK_V=block_v)
    if kernel == "backward_keys":
        fixed |= dict(BLOCK_M=32 if wide else 64, BLOCK_N=16 if wide else 32)
    else:
        # the heads of a group are the rows of a product, which has 16 at least
        fixed |= dict(GROUP=max(16, power_of_two(group)), BLOCK_N=32 if wide else 64)
    if arch == "interpreted":
        return fixed | dict(num_warps=1, num_stages=1)
    stages = 1 if wide or arch == "gfx942" else 2
    return fixed | dict(num_warps=8 if width > 128 else 4, num_stages=stages)


def attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, chosen: Tensor, at: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.topk.attention`. fp16, bf16 or fp32, heads up to 256 wide."""
    if q.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {q.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    out, lse = _Attention.apply(
        q,
        k,
        v,
        rule,
        chosen.int().contiguous(),
        at,
        scale,
    )
    return out, lse.unflatten(0, (k.shape[0], k.shape[1])).transpose(2, 3).flatten(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        rule,
        chosen,
        at,
        scale,
    ):
        (batch, q_heads, queries, dim), value_dim = q.shape, v.shape[3]
        heads, most = chosen.shape[1], chosen.shape[3]
        group = q_heads // heads
        at = at.expand(batch, queries).int().contiguous()
        out = q.new_zeros((batch, q_heads, queries, value_dim), dtype=torch.float32)
        lse = torch.full((batch * heads, queries, group), -torch.inf, device=q.device)
        fixed = constants(
            "forward",
            architecture(q.device),
            q.dtype,
            dim,
            value_dim,
            group,
        )
        strides = [step for x in (q, k, v, out) for step in x.stride()[:3]]
        if most:
            with torch.cuda.device_of(q):
                triton_kernels.forward[(batch * heads * queries,)](
                    q, k, v, chosen, at, out, lse,
                    *strides,
                    scale * LOG2E, heads, group, queries, most, rule.block, rule.window, rule.sinks,
                    **fixed,
                )  # fmt: skip
        ctx.save_for_backward(
            q,
            k,
            v,
            chosen,
            at,
            out,
            lse,
        )
        ctx.rule, ctx.scale = rule, scale
        return out, lse / LOG2E

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, d_out, d_lse):
        q, k, v, chosen, at, out, lse = ctx.saved_tensors
        rule, scale = ctx.rule, ctx.scale
        (batch, q_heads, queries, dim), keys, value_dim = q.shape, k.shape[2], v.shape[3]
        heads, most = chosen.shape[1], chosen.shape[3]
        group, blocks = q_heads // heads, keys // rule.block
        lines = batch * heads
        dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.zeros((lines, keys, dim), dtype=k.dtype, device=k.device)
        dv = torch.zeros((lines, keys, value_dim), dtype=v.dtype, device=v.device)
        if d_out is None:  # of an output that nothing depends on
            d_out = torch.zeros_like(out)
        share = (d_out * out).sum(dim=3).unflatten(1, (heads, group)).transpose(2, 3).flatten(0, 1)
        share = (share if d_lse is None else share - d_lse).contiguous()
        grad = dense_rows(d_out.to(q.dtype))
        order, begin = _by_block(chosen, blocks)
        arch = architecture(q.device)
        sizes = (arch, q.dtype, dim, value_dim, group)
        numbers = (scale, scale * LOG2E, heads, group, queries)
        ends = (rule.block, rule.window, rule.sinks)
        strides = [step for x in (q, k, v, grad) for step in x.stride()[:3]]
        if most:
            with torch.cuda.device_of(q):
                fixed = constants("backward_queries", *sizes)
                triton_kernels.backward_queries[(lines * queries,)](
                    q, k, v, chosen, at, grad, lse, share, dq,
                    *strides, *dq.stride()[:3],
                    *numbers, most, *ends,
                    **fixed,
                )  # fmt: skip
                fixed = constants("backward_keys", *sizes)
                tiles = cdiv(rule.block, fixed["BLOCK_N"])
                triton_kernels.backward_keys[(lines * blocks * tiles,)](
                    q, k, v, order, begin, at, grad, lse, share, dk, dv,
                    *strides,
                    *numbers, blocks, *ends, keys,
                    **fixed,
                )  # fmt: skip
        return dq, dk.view(k.shape), dv.view(v.shape), None, None, None, None


def _by_block(chosen: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """chosen (B, H, Tq, n) -> the tokens that chose each block, one block behind the other, int32,
    and where those of each block of all heads begin, int32 (P N + 1,). Nothing that the host has to
    wait for."""
    lines, queries = chosen.shape[0] * chosen.shape[1], chosen.shape[2]
    first = torch.arange(lines, device=chosen.device)[:, None, None] * blocks
    block = chosen.flatten(0, 1) + first
    block = torch.where(chosen.flatten(0, 1) >= 0, block, lines * blocks)
    token = torch.arange(queries, device=chosen.device)[:, None].expand(block.shape[1:])
    block, order = block.flatten().sort(stable=True)
    edges = torch.arange(lines * blocks + 1, device=chosen.device)
    begin = torch.searchsorted(block, edges)
    token = token.expand(lines, -1, -1).flatten()[order]
    return token.int(), begin.int()
