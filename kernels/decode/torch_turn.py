"""Raw keys that are rotated on the way, piece by piece: what is rotated never leaves the processor's cache. Rotated at
once, the newest 512 of 4096 keys take longer than it takes to score and weigh all of them: their memory is new.

Shapes: rows (B, Hkv, R, D), the queries of the heads that share a K/V head; k (B, Hkv, T, D), position (1 or B, T).
"""

from __future__ import annotations

import math
import threading

import torch
from effattn.kernels.flash.pattern import Layout
from effattn.kernels.flash.torch_fused import merge
from torch import Tensor

from ..scratch import scratch
from .turn import Turn, rotate

PIECE = 2**20  # numbers that are rotated at a time
_last = threading.local()


def products(rows: Tensor, k: Tensor, turn: Turn, position: Tensor, far: bool = False) -> Tensor:
    """With k rotated to `position`, `far` as in `Turn.keys`: (B, Hkv, R, T), in rows' dtype. Differentiable."""
    raw = far and math.isinf(turn.slow) and turn.scaling == 1
    if raw and k.dtype == rows.dtype:
        return rows @ k.transpose(-1, -2)
    if not k.shape[2] or not _in_place(rows, k):
        return rows @ turn.keys(k.to(rows.dtype), position, far).transpose(-1, -2)
    batch, kv_heads, tokens, dim = k.shape
    scores = rows.new_empty(batch, kv_heads, rows.shape[2], tokens)
    count = min(tokens, max(16, PIECE // dim))
    many = min(kv_heads, max(1, PIECE // (count * dim)))
    held = scratch(many * count * dim, rows.dtype, rows.device)[: many * count * dim].view(many, count, dim)
    for t in range(0, tokens, count):
        at = slice(t, t + count)
        cos, sin = (None, None) if raw else turn.cos_sin(position[:, at], rows.dtype, far)
        for b in range(batch):
            for h in range(0, kv_heads, len(held)):
                heads = slice(h, h + len(held))
                piece = k[b, heads, at]
                turned = held[: piece.shape[0], : piece.shape[1]]
                if raw:
                    turned.copy_(piece)
                else:
                    row = b if cos.shape[0] > 1 else 0
                    _rotate(turned, piece, cos[row], sin[row], turn.interleaved)
                scores[b, heads, :, at] = rows[b, heads] @ turned.transpose(-1, -2)
    return scores


def rerope(
    rows: Tensor,
    rows_far: Tensor,
    k: Tensor,
    v: Tensor,
    turn: Turn,
    layout: Layout,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One query against keys in order, the newest `turn.window` near: out (B, Hkv, R, D), log-sum-exp (B, Hkv, R).

    The far keys as they are stored, by the fused kernel, and the near ones piece by piece, merged by log-sum-exp.
    mask (1 or B, 1, 1, T): True where a key is seen.
    """
    kv_heads, new = k.shape[1], max(k.shape[2] - turn.window, 0)
    added = None if mask is None else torch.zeros_like(mask, dtype=k.dtype).masked_fill_(~mask, -torch.inf)
    # Every head of K and V as a row of a batch: few views are made a piece, whose time counts.
    queries, near, values = (x.reshape(-1, 1, *x.shape[2:]) for x in (rows, k[:, :, new:], v[:, :, new:]))
    cos, sin = (_per_head(x[:, None], kv_heads) for x in _newest(turn, layout, new, k))
    hidden = None if added is None else _per_head(added[..., new:], kv_heads)
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:3])
    size = near[0].numel()
    many = min(len(near), max(1, PIECE // max(size, 1)))
    held = scratch(many * size, queries.dtype, queries.device)[: many * size].view(many, *near.shape[1:])
    for n in range(0, len(near), len(held)):
        some = slice(n, min(n + len(held), len(near)))
        turned = held[: some.stop - n]
        _rotate(turned, near[some], _some(cos, some), _some(sin, some), turn.interleaved)
        out[some], lse[some] = _fused(queries[some], turned, values[some], _some(hidden, some), scale)
    out, lse = out.view(rows.shape), lse.view(rows.shape[:3])
    if new:
        if turn.scaling != 1:  # of far keys' turning dimensions, which are a product with the query's
            turning = torch.full_like(turn.inv_freq, turn.scaling, dtype=k.dtype)
            rows_far = rotate(rows_far, turning, torch.zeros_like(turning), turn.interleaved)
        far = None if added is None else added[..., :new]
        merge(out, lse, *_fused(rows_far, k[:, :, :new], v[:, :, :new], far, scale))
    return out, lse


def _newest(turn: Turn, layout: Layout, new: int, k: Tensor) -> tuple[Tensor, Tensor]:
    """By which keys from `new` on are rotated, (1 or B, n, R/2) each. What was made last is kept: the layers of a model
    ask for the same at every step, as they do of transformers' rotary module, which makes it once a step."""
    keys = k.shape[2]
    if layout.start is not None or layout.mask is not None:
        return turn.cos_sin(layout.key_positions(keys, k.device)[:, new:], k.dtype)
    asked = (layout.tail + new, layout.tail + keys, k.dtype, turn.scaling, torch.is_inference_mode_enabled())
    held = getattr(_last, "made", None)
    if held is None or held[0] != asked or not torch.equal(held[1], turn.inv_freq):
        at = torch.arange(*asked[:2], device=k.device)[None]
        held = _last.made = asked, turn.inv_freq.clone(), turn.cos_sin(at, k.dtype)
    return held[2]


def _per_head(x: Tensor, kv_heads: int) -> Tensor:
    """(1 or B, ...) -> (1 or B * Hkv, ...)"""
    return x if x.shape[0] == 1 else x.repeat_interleave(kv_heads, dim=0)


def _some(x: Tensor | None, heads: slice) -> Tensor | None:
    return x if x is None or x.shape[0] == 1 else x[heads]


def fits(rows: Tensor, k: Tensor, v: Tensor, turn: Turn) -> bool:
    """Whether `rerope` takes these tensors."""
    return (
        turn.window is not None and math.isinf(turn.slow) and _in_place(rows, k) and not v.requires_grad
        and k.dtype in (torch.float32, torch.float64) and k.shape[-1] == v.shape[-1]
    )  # fmt: skip


def _in_place(rows: Tensor, k: Tensor) -> bool:
    learning = torch.is_grad_enabled() and (rows.requires_grad or k.requires_grad)
    return not learning and not torch.compiler.is_compiling() and k.device.type == "cpu"


def _fused(rows, k, v, mask, scale) -> tuple[Tensor, Tensor]:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = run(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if mask is None:
        return out, lse
    blind = (mask.amax(dim=-1, keepdim=True) == -torch.inf).expand(*out.shape[:3], 1)
    return out.masked_fill(blind, 0), lse.masked_fill(blind[..., 0], -torch.inf)


def _rotate(out: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """`rotate` into `out`; cos and sin (..., R/2)."""
    if k.dtype != out.dtype:
        k = k.to(out.dtype)
    half = cos.shape[-1]
    halves = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    (a, b), (x, y) = ([z[..., part] for part in halves] for z in (k, out))
    if interleaved or 2 * half < k.shape[-1]:
        torch.mul(a, cos, out=x), torch.mul(b, cos, out=y)
    else:  # longer loops
        torch.mul(k, torch.cat([cos, cos], dim=-1), out=out)
    x.addcmul_(b, sin, value=-1), y.addcmul_(a, sin)
    if 2 * half < k.shape[-1]:
        out[..., 2 * half :] = k[..., 2 * half :]
