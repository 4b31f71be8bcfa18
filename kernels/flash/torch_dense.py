"""Dense attention in plain torch: its fused kernel, in blocks of queries where something is padded,
and one query over a cache. Shapes as in `torch_impl`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .pattern import Layout

BLOCK = 256  # queries of dense attention with padding


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, layout: Layout, scale: float) -> Tensor:
    """Attention of all to all, by torch's own fused kernels; scores in memory only under a mask."""
    real = padding_mask(layout, k)
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return one_query(q, k, v, real, scale)
    value_dim = v.shape[-1]
    # the fused kernels want one width; zeros change neither scores nor outputs
    if value_dim != q.shape[-1]:
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

    The heads that share a K/V head become the rows of one small matrix, so K and V are read once,
    except in half precision without a mask: there, that rounds otherwise than the call transformers
    makes, and 2 to 4 % of the greedy tokens of random models differ. Ours then is the same call,
    bit for bit. It is slower: 4 query heads a K/V head, 4096 keys, 2 AVX2 cores: 2.9 against 0.32
    ms in bf16, 6.3 against 1.7 ms in fp16 (fp32, packed here: 0.66, 0.32)."""
    batch, heads, _, dim = q.shape
    if mask is None and q.dtype in (torch.bfloat16, torch.float16) and dim == v.shape[-1] <= 256:
        gqa = {} if heads == k.shape[1] else {"enable_gqa": True}
        return scaled_dot_product_attention(q, k, v, scale=scale, **gqa)
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    bias = None if mask is None else mask[:, None, None, :]
    out = scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale).reshape(
        batch, heads, 1, v.shape[-1]
    )
    return out if mask is None else torch.where(mask.any(dim=1)[:, None, None, None], out, 0.0)


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, padding_mask: Tensor | None, scale: float
) -> Tensor:
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
                q[:, :, start:stop],
                k[:, :, :end],
                v[:, :, :end],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, dim=2)


def _zero_blind_rows(out: Tensor, causal: bool, padding_mask: Tensor, layout: Layout) -> Tensor:
    """What a kernel returns for a row without keys differs between devices and versions (0, a mean,
    NaN): fix it. Padding on the left sees nothing either, causal or not."""
    queries, keys = out.shape[2], padding_mask.shape[1]
    seen = padding_mask.cumsum(dim=1)  # real tokens up to each position
    sees = (seen[:, -queries:] if causal else seen[:, -1:]) > 0
    if layout.start is not None:
        sees = sees & (layout.query_positions(queries, keys, out.device) >= 0)
    return torch.where(sees[:, None, :, None], out, 0.0)
