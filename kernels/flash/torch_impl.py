"""Softmax attention on torch's fused kernels. No (Tq, Tk) mask or score matrix ever exists.

Without a padding mask, the whole call is one fused kernel. Otherwise the queries go in blocks of `BLOCK` rows, each
against only the keys it can see: that bounds the mask, and it skips the upper triangle, so on CPU it is no slower than
the unmasked kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

BLOCK = 256


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, padding_mask: Tensor | None, scale: float) -> Tensor:
    """q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, Hq, Tq, Dv) in q's dtype.

    Query i sits at position Tk - Tq + i. A query that may see no key gives 0, and so do its gradients.
    """
    value_dim = v.shape[-1]
    if value_dim != q.shape[-1]:  # the fused kernels want one width; zeros change neither scores nor outputs
        width = max(value_dim, q.shape[-1])
        q, k, v = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    causal = causal and queries > 1  # the last query sees every key anyway
    if queries == 1:
        out = _one_query(q, k, v, padding_mask, scale)
    elif padding_mask is None and (not causal or queries == keys):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    else:
        out = _in_blocks(q, k, v, causal, padding_mask, scale)
    if padding_mask is not None:
        out = _zero_blind_rows(out, causal, padding_mask)
    return out[..., :value_dim]


def _one_query(q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor | None, scale: float) -> Tensor:
    """Decoding: the heads that share a K/V head become the rows of one small matrix, so K and V are read once.

    Measured on CPU against `enable_gqa`, 4 query heads a K/V head, 4096 keys: 2 times faster in fp32, 12 in bf16.
    """
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    mask = None if padding_mask is None else padding_mask[:, None, None, :]
    return scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale).reshape(batch, heads, 1, dim)


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


def _zero_blind_rows(out: Tensor, causal: bool, padding_mask: Tensor) -> Tensor:
    """What a kernel returns for a row without keys differs between devices and versions (0, a mean, NaN): fix it."""
    seen = padding_mask.cumsum(dim=1)  # real tokens up to each position
    sees = (seen[:, -out.shape[2] :] if causal else seen[:, -1:]) > 0
    return torch.where(sees[:, None, :, None], out, 0.0)
