"""Exact attention in plain torch: CPU first, any device. Linear in memory: no (Tq, Tk) scores or mask ever exist.

Dense attention is torch's fused kernel, in blocks of queries where something is padded. A pattern is walked through in
tiles that visit only the keys some query of the tile sees: by `torch_blocks`, forward and backward, on any device, and
where it can by `torch_fused`, which is faster.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from . import torch_blocks, torch_fused
from .pattern import Blocks, Layout, Pattern, Window
from .torch_blocks import Problem, Side

BLOCK = 256  # queries of dense attention with padding


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, Hq, Tq, Dv) in q's dtype, and the log-sum-exp.

    A query that may see no key gives 0, and so do its gradients.
    """
    pattern = _simplest(pattern, layout.tokens(k.shape[2]), causal)
    special = softcap is not None or (q_first is not None and pattern.first > 0) or need_lse
    if type(pattern) is Pattern and not special and not layout.slots and not layout.tail:
        return _dense(q, k, v, causal, layout, scale), None
    if torch.compiler.is_compiling():  # a loop over tiles does not trace; this does, at the cost of a mask
        from effattn.kernels.decode.torch_impl import attention as at_once

        return at_once(
            q, k, v, pattern, layout, causal=causal, scale=scale, softcap=softcap, q_first=q_first, counts=None,
            need_lse=need_lse,
        )  # fmt: skip
    return _in_tiles(q, k, v, pattern, layout, causal, scale, softcap, q_first, need_lse)


def _simplest(pattern: Pattern, total: int, causal: bool) -> Pattern:
    """Dense where the pattern hides nothing at this length."""
    if type(pattern) is Window and pattern.back >= total and (causal or pattern.ahead >= total):
        return Pattern(pattern.first)
    if type(pattern) is Blocks and pattern.size >= total and not pattern.shifted:
        return Pattern(pattern.first)
    return pattern


# Dense -----------------------------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, layout: Layout, scale: float) -> Tensor:
    real = padding_mask(layout, k)
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return one_query(q, k, v, real, scale)
    value_dim = v.shape[-1]
    if value_dim != q.shape[-1]:  # the fused kernels want one width; zeros change neither scores nor outputs
        width = max(value_dim, q.shape[-1])
        q, k, v = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    if real is None and (not causal or queries == keys):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    else:
        out = _in_blocks(q, k, v, causal, real, scale)
    if real is not None:
        out = _zero_blind_rows(out, causal, real, layout)
    return out[..., :value_dim]


def padding_mask(layout: Layout, k: Tensor) -> Tensor | None:
    """(B, Tk) bool: keys that are real."""
    if layout.start is None:
        return layout.mask
    real = torch.arange(k.shape[2], device=k.device) >= layout.start[:, None]
    return real if layout.mask is None else real & layout.mask


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense decoding of one token over the keys of `mask` (B, Tk) bool, (B, Hq, 1, Dv).

    The heads that share a K/V head become the rows of one small matrix, so K and V are read once, except in half
    precision without a mask: there, that rounds otherwise than the call transformers makes, and 2 to 4 % of the greedy
    tokens of random models differ. Ours then is the same call, bit for bit. It is slower: 4 query heads a K/V head,
    4096 keys, 2 AVX2 cores: 2.9 against 0.32 ms in bf16, 6.3 against 1.7 ms in fp16 (fp32, packed here: 0.66, 0.32).
    """
    batch, heads, _, dim = q.shape
    if mask is None and q.dtype in (torch.bfloat16, torch.float16) and dim == v.shape[-1] <= 256:
        gqa = {} if heads == k.shape[1] else {"enable_gqa": True}
        return scaled_dot_product_attention(q, k, v, scale=scale, **gqa)
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    bias = None if mask is None else mask[:, None, None, :]
    out = scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale).reshape(batch, heads, 1, v.shape[-1])
    return out if mask is None else torch.where(mask.any(dim=1)[:, None, None, None], out, 0.0)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool, padding_mask: Tensor | None, scale: float) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    positions = torch.arange(keys, device=q.device)
    blocks = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        end = keys - queries + stop if causal else keys
        mask = None if padding_mask is None else padding_mask[:, None, None, :end]
        if causal:
            triangle = positions[:end] <= positions[end - (stop - start) : end, None]
            mask = triangle if mask is None else mask & triangle
        blocks.append(
            scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(blocks, dim=2)


def _zero_blind_rows(out: Tensor, causal: bool, padding_mask: Tensor, layout: Layout) -> Tensor:
    """What a kernel returns for a row without keys differs between devices and versions (0, a mean, NaN): fix it.
    Padding on the left sees nothing either, causal or not."""
    queries, keys = out.shape[2], padding_mask.shape[1]
    seen = padding_mask.cumsum(dim=1)  # real tokens up to each position
    sees = (seen[:, -queries:] if causal else seen[:, -1:]) > 0
    if layout.start is not None:
        sees = sees & (layout.query_positions(queries, keys, out.device) >= 0)
    return torch.where(sees[:, None, :, None], out, 0.0)


# Patterns --------------------------------------------------------------------------------------------------------


def _in_tiles(q, k, v, pattern, layout, causal, scale, softcap, q_first, need_lse) -> tuple[Tensor, Tensor | None]:
    """Splits the call into problems whose rows and heads share their borders, solves each, and joins the results."""
    row_parts, head_parts = _rows(pattern, layout), _heads(pattern, q.shape[1], k.shape[1])
    simple = replace(pattern, shifted=False) if isinstance(pattern, Blocks) else pattern
    done = []
    for rows, residue in row_parts:
        part = layout if rows is None else replace(
            layout, start=layout.start[rows], mask=None if layout.mask is None else layout.mask[rows]
        )  # fmt: skip
        pieces = []
        for of_q, of_k, shift in head_parts:
            inputs = [None if x is None else x if rows is None else x[rows] for x in (q, k, v, q_first)]
            if len(head_parts) > 1:
                inputs = [None if x is None else x[:, h] for x, h in zip(inputs, (of_q, of_k, of_k, of_q), strict=True)]
            problem, tensors = _problem(*inputs, simple, part, causal, scale, softcap, residue, shift)
            pieces.append(_solve(problem, need_lse, *tensors))
        done.append(pieces[0] if len(pieces) == 1 else _join(pieces, dim=1))
    if len(done) == 1:
        return done[0]
    back = torch.cat([rows for rows, _ in row_parts]).argsort()
    return tuple(None if x is None else x[back] for x in _join(done, dim=0))


def _join(pieces: list[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    return tuple(None if parts[0] is None else torch.cat(parts, dim=dim) for parts in zip(*pieces, strict=True))


def _rows(pattern: Pattern, layout: Layout) -> list[tuple[Tensor | None, int]]:
    """Rows of the batch whose blocks begin at the same tokens, and how far their first token is past a border."""
    if layout.start is None or not isinstance(pattern, Blocks):
        return [(None, 0)]
    residues = (layout.start % pattern.size).tolist()
    if len(set(residues)) == 1:
        return [(None, residues[0])]
    return [
        (torch.tensor([n for n, r in enumerate(residues) if r == residue], device=layout.start.device), residue)
        for residue in sorted(set(residues))
    ]


def _heads(pattern: Pattern, heads: int, kv_heads: int) -> list[tuple[slice, slice, int]]:
    """Query heads, their K/V heads, and how much earlier their borders lie. Where the halves of the query heads meet
    inside of a K/V head's group, that group is split."""
    if not isinstance(pattern, Blocks) or not pattern.shifted:
        return [(slice(None), slice(None), 0)]
    group, half, shift = heads // kv_heads, heads // 2, pattern.size // 2
    low, high = half // group, -(-half // group)  # K/V heads wholly in the first half; where the second's own begin
    cuts = [
        (0, low * group, 0, low, 0), (low * group, half, low, high, 0),
        (half, high * group, low, high, shift), (high * group, heads, high, kv_heads, shift),
    ]  # fmt: skip
    return [(slice(a, b), slice(c, d), s) for a, b, c, d, s in cuts if b > a]


def _problem(q, k, v, q_first, pattern, layout, causal, scale, softcap, residue, shift):
    """The problem, and its q, k, v, q_first, keys and values of the side. Layouts' padding becomes `hidden` keys."""
    queries, keys = q.shape[2], k.shape[2]
    total = layout.tokens(keys)
    everywhere = type(pattern) is Pattern and q_first is None  # then no key is `first`: all are seen anyway
    sinks = max(layout.slots, 0 if everywhere else min(pattern.first, total))
    problem = Problem(
        pattern, causal, scale, softcap, queries, keys - layout.slots, total - queries, layout.tail,
        phase=shift - residue, start=layout.start,
    )  # fmt: skip
    side, k_side, v_side, position = None, None, None, None
    if layout.start is not None or layout.mask is not None or sinks:
        position = layout.key_positions(keys, q.device)
    if sinks:
        side, k_side, v_side = _gather_side(k, v, position, sinks, pattern.first, shift)
    k0, k1 = problem.key_range(0, queries)
    k, v = (x[:, :, layout.slots + k0 : layout.slots + k1] for x in (k, v))
    hidden = None if position is None else position[:, layout.slots + k0 : layout.slots + k1] < sinks
    if hidden is not None and not hidden.any():
        hidden = None
    problem = replace(problem, keys=k1 - k0, first_key=layout.tail + k0, hidden=hidden, side=side)
    return problem, (q, k, v, q_first, k_side, v_side)


def _gather_side(k: Tensor, v: Tensor, position: Tensor, sinks: int, first: int, shift: int):
    """The keys at positions below `sinks`, row by row, wherever they lie."""
    keys = k.shape[2]
    inside = (position >= 0) & (position < sinks)
    at = torch.full((position.shape[0], sinks + 1), -1, device=k.device)
    numbers = torch.arange(keys, device=k.device).expand_as(position)
    at = at.scatter(1, torch.where(inside, position, sinks), numbers)[:, :sinks]
    index = at.clamp(min=0)[:, None, :, None].expand(k.shape[0], k.shape[1], -1, 1)
    gathered = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return Side(at >= 0, first, shift), *gathered


def _solve(problem: Problem, need_lse: bool, q, k, v, q_first, k_side, v_side) -> tuple[Tensor, Tensor | None]:
    tensors = (q, k, v, q_first if k_side is not None else None, k_side, v_side)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, lse = _Attention.apply(problem, *tensors)
    else:
        out, lse = _forward(problem, *tensors)
        out = out.to(q.dtype)
    return out, lse if need_lse else None


class _Attention(torch.autograd.Function):
    """Keeps the output and the log-sum-exp; backward computes the weights again."""

    @staticmethod
    def forward(ctx, problem, *tensors):
        out, lse = _forward(problem, *tensors)
        ctx.problem = problem
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        return out.to(tensors[0].dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse):
        *tensors, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype)
        if torch_fused.fits(ctx.problem, tensors[0], tensors[2]):
            grads = torch_fused.backward(ctx.problem, tensors, out, lse, d_out, d_lse)
        else:
            flat = [None if x is None else _flat(x, tensors[1].shape[1]) for x in (out, lse, d_out, d_lse)]
            grads = torch_blocks.backward(ctx.problem, *_worked(tensors), *flat)
        return None, *(
            None if x is None else grad.reshape(x.shape).to(x.dtype) for x, grad in zip(tensors, grads, strict=True)
        )


def _flat(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, T, ...) -> (B * Hkv, G, T, ...)"""
    return x.reshape(x.shape[0] * kv_heads, x.shape[1] // kv_heads, *x.shape[2:])


def _worked(tensors) -> list[Tensor | None]:
    """As `torch_blocks` takes them: at least fp32, since half precision on a CPU without units for it is emulated
    (a bf16 product runs at 1 GFLOP/s, an fp32 one at 150), and so that scores are not rounded; heads flat."""
    q, k, v, q_first, k_side, v_side = (
        x if x is None or x.dtype == torch.float64 else x.float() for x in tensors
    )  # fmt: skip
    kv_heads = k.shape[1]
    queries = [None if x is None else _flat(x, kv_heads) for x in (q, q_first)]
    others = [None if x is None else x.reshape(-1, *x.shape[2:]) for x in (k, v, k_side, v_side)]
    return [queries[0], *others[:2], queries[1], *others[2:]]


def _forward(problem: Problem, q, k, v, q_first, k_side, v_side) -> tuple[Tensor, Tensor]:
    """-> (B, Hq, Tq, Dv) and (B, Hq, Tq), both fp32 or fp64."""
    tensors = q, k, v, q_first, k_side, v_side
    if torch_fused.fits(problem, q, v):
        out, lse = torch_fused.forward(problem, *tensors)
    else:
        out, lse = torch_blocks.forward(problem, *_worked(tensors))
        out, lse = out.view(*q.shape[:3], v.shape[-1]), lse.view(q.shape[:3])
    if problem.start is not None and not problem.causal:  # padding on the left; causal, it saw nothing anyway
        number = torch.arange(problem.first_query, problem.first_query + problem.queries, device=q.device)
        blind = (number < problem.start[:, None])[:, None]
        out, lse = out.masked_fill_(blind[..., None], 0), lse.masked_fill_(blind, -torch.inf)
    return out, lse
