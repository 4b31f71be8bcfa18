"""Raw keys that are rotated on the way, piece by piece: what is rotated never leaves the
processor's cache. Rotated at once, the newest 512 of 4096 keys take longer than it takes to score
and weigh all of them: their memory is new.

Shapes: rows (B, Hkv, R, D), the queries of the heads that share a K/V head; k (B, Hkv, T, D),
position (1 or B, T)."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout

from ..rows import dense_rows
from ..scratch import scratch
from .turn import Turn, rotate

PIECE = 2**20  # numbers that are rotated at a time
_last = threading.local()


def products(rows: Tensor, k: Tensor, turn: Turn, position: Tensor, far: bool = False) -> Tensor:
    """With k rotated to `position`, `far` as in `Turn.keys`: (B, Hkv, R, T), in rows' dtype.
    Differentiable.
    """
    raw = far and math.isinf(turn.slow) and turn.scaling == 1
    if raw and k.dtype == rows.dtype:
        return rows @ k.transpose(-1, -2)
    if not k.shape[2] or not _in_place(rows, k):
        return rows @ turn.keys(k.to(rows.dtype), position, far).transpose(-1, -2)
    batch, kv_heads, tokens, dim = k.shape
    scores = rows.new_empty(batch, kv_heads, rows.shape[2], tokens)
    count = min(tokens, max(16, PIECE // dim))
    many = min(kv_heads, max(1, PIECE // (count * dim)))
    held = scratch(many * count * dim, rows.dtype, rows.device)[: many * count * dim].view(
        many, count, dim
    )
    rows = rows if raw else _in_pairs(rows, turn)
    for t in range(0, tokens, count):
        at = slice(t, t + count)
        turns = None if raw else torch.complex(*turn.cos_sin(position[:, at], rows.dtype, far))
        for b in range(batch):
            for h in range(0, kv_heads, len(held)):
                heads = slice(h, h + len(held))
                piece = k[b, heads, at]
                turned = held[: piece.shape[0], : piece.shape[1]]
                if raw:
                    turned.copy_(piece)
                else:
                    _rotate(turned, piece, turns[b if len(turns) > 1 else 0], turn.interleaved)
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
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One query against keys in order, the newest `turn.window` near: out (B, Hkv, R, D),
    log-sum-exp (B, Hkv, R).

    The far keys as they are stored, by the fused kernel, and the near ones piece by piece, merged
    by log-sum-exp. mask (1 or B, 1, 1, T): True where a key is seen. Every call of torch counts
    here: over 512 keys they are the time."""
    new = max(k.shape[2] - turn.window, 0)
    k_far, k, v_far, v = k[:, :, :new], k[:, :, new:], v[:, :, :new], v[:, :, new:]
    added = (
        None
        if mask is None
        else torch.zeros_like(mask, dtype=k.dtype).masked_fill_(~mask, -torch.inf)
    )
    far, near = (None, None) if added is None else (added[..., :new], added[..., new:])
    turns = _newest(turn, layout, new, k)
    out, lse = _near(_in_pairs(rows, turn), k, v, turns, near, turn.interleaved, scale)
    if not new:
        return out, lse
    if turn.scaling != 1:  # of far keys' turning dimensions, which are a product with the query's
        turning = torch.full_like(turn.inv_freq, turn.scaling, dtype=k.dtype)
        rows_far = rotate(rows_far, turning, torch.zeros_like(turning), turn.interleaved)
    more, sums = _fused(rows_far, k_far, v_far, far, scale)
    share = (sums - lse).sigmoid_()
    if mask is not None:
        share.nan_to_num_(0)  # neither part saw a key
    return out.lerp_(more, share[..., None]), torch.logaddexp(lse, sums) if need_lse else None


def _near(rows, k, v, turns, added, interleaved: bool, scale: float) -> tuple[Tensor, Tensor]:
    """With keys rotated by `turns` (1 or B, 1, T, R/2), in halves of the batch or the heads while
    there are many.
    """
    dim = 0 if k.shape[0] > 1 else 1
    if k.numel() > PIECE and k.shape[dim] > 1:
        half = k.shape[dim] // 2
        some = [
            x if x is None or x.shape[dim] == 1 else x.split([half, x.shape[dim] - half], dim)
            for x in (rows, k, v, turns, added)
        ]
        parts = [
            _near(*(x[i] if isinstance(x, tuple) else x for x in some), interleaved, scale)
            for i in range(2)
        ]
        return tuple(map(torch.cat, zip(*parts, strict=True), [dim, dim]))
    turned = scratch(k.numel(), rows.dtype, rows.device)[: k.numel()].view(k.shape)
    _rotate(turned, k, turns, interleaved)
    return _fused(rows, turned, v, added, scale)


def _newest(turn: Turn, layout: Layout, new: int, k: Tensor) -> Tensor:
    """By which k, the keys from `new` on, are rotated, complex (1 or B, 1, n, R/2). What was made
    last is kept: the layers of a model ask for the same at every step, as they do of transformers'
    rotary module, which makes it once."""
    keys = new + k.shape[2]
    if layout.start is not None or layout.mask is not None:
        return torch.complex(*turn.cos_sin(layout.key_positions(keys, k.device)[:, new:], k.dtype))[
            :, None
        ]
    asked = (
        layout.tail + new,
        layout.tail + keys,
        k.dtype,
        turn.scaling,
        torch.is_inference_mode_enabled(),
    )
    held = getattr(_last, "made", None)
    if held is None or held[0] != asked or not torch.equal(held[1], turn.inv_freq):
        at = torch.arange(*asked[:2], device=k.device)[None]
        held = _last.made = (
            asked,
            turn.inv_freq.clone(),
            torch.complex(*turn.cos_sin(at, k.dtype))[:, None],
        )
    return held[2]


def fits(rows: Tensor, k: Tensor, v: Tensor, turn: Turn) -> bool:
    """Whether `rerope` takes these tensors."""
    return (
        turn.window is not None
        and math.isinf(turn.slow)
        and _in_place(rows, k)
        and not v.requires_grad
        and k.dtype in (torch.float32, torch.float64)
        and k.shape[-1] == v.shape[-1]
    )


def _in_place(rows: Tensor, k: Tensor) -> bool:
    learning = torch.is_grad_enabled() and (rows.requires_grad or k.requires_grad)
    return (
        not learning
        and not torch.compiler.is_compiling()
        and k.device.type == "cpu"
        and k.shape[-1] % 2 == 0
    )


def _fused(rows, k, v, mask, scale) -> tuple[Tensor, Tensor]:
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, k, v = map(dense_rows, (rows, k, v))  # it does not ask
    out, lse = run(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if mask is None:
        return out, lse
    blind = (mask.amax(dim=-1, keepdim=True) == -torch.inf).expand(*out.shape[:3], 1)
    return out.masked_fill(blind, 0), lse.masked_fill(blind[..., 0], -torch.inf)


def _in_pairs(x: Tensor, turn: Turn) -> Tensor:
    """x (..., D) with the dimensions that turn together beside each other, as `_rotate` leaves
    keys.
    """
    if turn.interleaved:
        return x
    turning = 2 * turn.inv_freq.shape[0]
    pairs = x[..., :turning].unflatten(-1, (2, -1)).mT.flatten(-2)
    return torch.cat([pairs, x[..., turning:]], dim=-1) if turning < x.shape[-1] else pairs


def _rotate(out: Tensor, k: Tensor, turns: Tensor, interleaved: bool) -> None:
    """`rotate` into `out`, by complex turns (..., R/2), but with pairs beside each other whatever
    they are in k: that makes them complex numbers, and one multiplication is half the time of four
    with their sums."""
    if k.dtype != out.dtype:
        k = k.to(out.dtype)
    half = turns.shape[-1]
    turning, turned = (
        (k, out) if 2 * half == k.shape[-1] else (x[..., : 2 * half] for x in (k, out))
    )
    turned = torch.view_as_complex(turned.unflatten(-1, (half, 2)))
    torch.complex(
        *turning.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(
            -1 if interleaved else -2
        ),
        out=turned,
    )
    turned.mul_(turns)
    if 2 * half < k.shape[-1]:
        out[..., 2 * half :] = k[..., 2 * half :]
