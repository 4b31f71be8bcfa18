"""PyTorch's `flex_attention` without a compiler, forward and backward, on any device; its tiles are
made for CPUs, where torch has no backward of its own.

    mask = create_block_mask(causal, None, None, 8192, 8192, device="cpu")      # torch's own
    out = effattn.flex_attention(q, k, v, score_mod=alibi, block_mask=mask)

Who sees whom is a `BlockMask`, how a pair scores a `score_mod`, both written for scalars, as torch
documents them (arXiv:2412.05496): `torch.vmap` runs them on a tile's numbers. Blocks that the mask
leaves out are not visited, and full ones not asked for their mask.

B: rows; Hq, Hkv: query and key/value heads; Tq, Tk: queries and keys; D, Dv: of a key, of a
value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .captured import captured
from .tables import tables_of
from .torch_impl import Flex

if TYPE_CHECKING:  # 0.3 s at its first use
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["flex_attention"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(score_mod(scale q k^T)) v over the pairs that `block_mask` shows: (B, Hq, Tq, Dv) in
    q's dtype; 0 for a query that sees none. With `return_lse` also the log-sum-exp of each query's
    scores, (B, Hq, Tq), fp32 (fp64 for fp64 inputs), through which gradients flow too.

    query (B, Hq, Tq, D), key (B, Hkv, Tk, D), value (B, Hkv, Tk, Dv), of one float dtype and
    device. score_mod(score, b, h, q_idx, kv_idx) -> score and the mask's mask_mod(b, h, q_idx,
    kv_idx) -> bool get scalars (0-d tensors). block_mask: of these lengths, and of B and Hq or 1
    row and head. scale: default D^-0.5. enable_gqa: Hq may be a multiple of Hkv.

    Gradients flow to query, key and value, and to tensors that score_mod takes from around it and
    that ask for them. ValueError for what does not fit, and for a score_mod that has such tensors
    where nobody finds them."""
    _check(
        query,
        key,
        value,
        block_mask,
        enable_gqa,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    learned = captured(score_mod, query) if torch.is_grad_enabled() else []
    tables = tables_of(block_mask, query.shape[2], key.shape[2])
    width = max(query.shape[-1], value.shape[-1])
    # the fused kernel wants one width; zeros change neither scores nor outputs
    q, k, v = (
        x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (query, key, value)
    )
    out, lse = Flex.apply(
        tables,
        score_mod,
        scale,
        q,
        k,
        v,
        *learned,
    )
    out = out[..., : value.shape[-1]]
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask,
    enable_gqa: bool,
) -> None:
    """ValueError for tensors and masks that do not fit together."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor) or x.ndim != 4 or 0 in x.shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{name}: expected (batch, heads, tokens, head_dim), all of them >= 1, got {got}"
            )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        got = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"query, key, value: expected one float dtype, got {got}")
    if not q.device == k.device == v.device:
        got = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"query, key, value: expected one device, got {got}")
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if k.shape != (batch, kv_heads, keys, dim):
        raise ValueError(
            f"key: expected ({batch}, kv_heads, keys, {dim}) to fit query, got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"value: expected ({batch}, {kv_heads}, {keys}, value_dim) to fit key, got "
            f"{tuple(v.shape)}"
        )
    if heads % kv_heads or (heads != kv_heads and not enable_gqa):
        valid = f"a multiple of {kv_heads}" if enable_gqa else f"{kv_heads}, or enable_gqa=True"
        raise ValueError(f"query: got {heads} heads for {kv_heads} of key, valid is {valid}")
    if block_mask is None:
        return
    if not hasattr(block_mask, "kv_num_blocks"):
        raise ValueError(
            f"block_mask: got {type(block_mask).__name__}, valid is torch's BlockMask, as "
            "create_block_mask makes it"
        )
    rows, mask_heads, of_q, of_k = block_mask.shape
    if rows not in (1, batch) or mask_heads not in (1, heads) or (of_q, of_k) != (queries, keys):
        raise ValueError(
            f"block_mask: got one of {tuple(block_mask.shape)}, valid is ({batch} or 1, {heads} or "
            f"1, {queries}, {keys})"
        )
