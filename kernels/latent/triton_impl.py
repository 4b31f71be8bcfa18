"""Attention over latents in Triton: which of the ways a call goes, and its launches.

Where nothing turns, W_UK goes into the query, and latents are keys as well as values: the decode
kernel reads them, up to `decode.triton_impl.WIDEST` numbers. Where keys turn they are made a tile
at a time (`triton_kernels`). What has no kernel of its own (norms of keys, Leaky ReRoPE, ReRoPE of
several queries or padded rows) is expanded in memory, for one layer and one call.

B: rows; Hq, Hkv: query and key/value heads; T: tokens held; D, Dv: of a key, of a value; r: of a
latent."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .. import decode
from ..decode.triton_impl import (
    DTYPES,
    FARTHEST,
    TILE_BYTES,
    WIDEST,
    in_base_two,
    merge,
    predicate,
    processors,
    results,
    shared_memory,
    split,
    strides,
    worth_reading,
)
from ..decode.turn import Turn
from ..flash.pattern import Layout, Pattern
from ..flash.rules import Bias
from ..flash.triton_bias import BIASES, arguments
from ..merge import merge as merge_parts
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from .triton_kernels import gather, score_keys, score_latents


def attention(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    turn: Turn | None,
    bias: Bias | None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """(B, Hq, Tq, Dv) in q's dtype, and, needed or not, the log-sum-exps (B, Hq, Tq)."""
    _check(q, c, maps)
    common = dict(scale=scale, softcap=softcap)
    in_order = layout.ring is None and not layout.slots and layout.start is None
    far = turn is not None and turn.window is not None
    simple = q.shape[2] == 1 and in_order and layout.mask is None and type(pattern) is Pattern
    q_first = q_first if pattern.first else None
    # a key's bias adds to all scores of a row alike, which a softcap does not leave alike
    capped = softcap is not None and maps.key_bias is not None
    if maps.key_norm is not None or (turn is None and (capped or q_first is not None)):
        return _whole(q, c, maps, pattern, layout, common, q_first, turn, bias)
    if turn is None:
        parts = [_absorbed(q, c, maps, pattern, layout, bias=bias, **common)]
    elif not far:
        parts = [_expanded(q, c, maps, pattern, layout, turn, q_first, bias, **common)]
    elif simple and math.isinf(turn.slow) and turn.scaling == 1 and not capped:
        new = max(c.shape[1] - turn.window, 0)
        near = replace(turn, window=None, q_far=None)
        behind = replace(layout, tail=layout.tail + new)
        parts = [_expanded(q, c[:, new:], maps, pattern, behind, near, None, None, **common)]
        if new:  # all of them, before the query: as if they were both ways
            parts.append(
                _absorbed(turn.q_far, c[:, :new], maps, pattern, layout, bias=None, **common)
            )
    else:
        return _whole(q, c, maps, pattern, layout, common, None, turn, None)
    sums, lse = parts[0] if len(parts) == 1 else merge_parts(parts)
    # a query that sees nothing gives 0, and not the bias of values
    out = torch.where(lse[..., None] == -torch.inf, 0.0, maps.absorbed(sums))
    return out.to(q.dtype), lse


def _check(q: Tensor, c: Tensor, maps) -> None:
    """ValueError for what the kernels cannot do and plain torch can."""
    dim = max(maps.key.shape[1], maps.value.shape[1])
    if q.dtype not in DTYPES or dim > WIDEST:
        raise ValueError(
            f"latent: got {q.dtype} with heads of {dim}; the Triton kernels take float16, bfloat16 "
            f"and float32 with at most {WIDEST}, impl='torch' takes all"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, c, maps.key, maps.value)):
        raise ValueError(
            "latent: the Triton kernels have no gradients; valid are torch.no_grad() and "
            "impl='torch'"
        )


def _whole(q, c, maps, pattern, layout, common, q_first, turn, bias) -> tuple[Tensor, Tensor]:
    """By the decode kernel, over keys and values of all tokens held."""
    return decode.attention(
        q,
        maps.keys(c),
        maps.values(c),
        pattern,
        layout,
        causal=True,
        q_first=q_first,
        turn=turn,
        bias=bias,
        impl="triton",
        lse=True,
        **common,
    )


def _absorbed(
    q: Tensor, c: Tensor, maps, pattern: Pattern, layout: Layout, *, scale, softcap, bias
) -> tuple[Tensor, Tensor]:
    """Sums of latents (B, Hq, Tq, r) by queries that W_UK went into, and the log-sum-exps."""
    kv_heads, size, rank = maps.key.shape
    rows = q.reshape(q.shape[0], kv_heads, -1, size)
    latent_q = (rows @ maps.key.to(q)).view(*q.shape[:3], rank)
    if rank <= WIDEST:
        one = c[:, None]
        given = dict(scale=scale, softcap=softcap, bias=bias, impl="triton", lse=True)
        sums, lse = decode.attention(latent_q, one, one, pattern, layout, **given)
    else:
        sums, lse = _by_scores(latent_q, c, pattern, layout, bias, scale)
    if maps.key_bias is not None:
        added = (rows.float() * maps.key_bias.float()[:, None]).sum(dim=-1).view_as(lse)
        lse = lse + scale * added
    return sums, lse


def _expanded(
    q: Tensor,
    c: Tensor,
    maps,
    pattern: Pattern,
    layout: Layout,
    turn: Turn,
    q_first: Tensor | None,
    bias: Bias | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Sums of latents (B, Hq, Tq, r) by keys that are made and turned a tile at a time."""
    heads, queries, dim = q.shape[1:]
    kv_heads = maps.key.shape[0]
    group, half = heads // kv_heads, len(turn.inv_freq)
    sizes = key_tile(dim, half, q.element_size(), group * queries, shared_memory(q.device))
    row_tiles = cdiv(group * queries, sizes["BLOCK_M"])
    read = _Read(q, c, pattern, layout, bias, sizes["BLOCK_N"])
    q, q_first, key = dense_rows(q), dense_rows(q_first), maps.key.to(q).contiguous()
    own = None if maps.key_bias is None else maps.key_bias.to(q).contiguous()
    with torch.cuda.device_of(q):
        score_keys[kv_heads * row_tiles, read.tiles, len(q)](
            q, q_first, c, key, own, read.scores, turn.inv_freq.to(q.device, torch.float32),
            *read.held, *strides(q), *strides(q_first), c.stride(0), c.stride(1), c.shape[2],
            read.mask_b, group, row_tiles, *in_base_two(scale, softcap), *read.bias,
            float(turn.scaling), queries, *read.numbers,
            D=dim, R2=half, INTERLEAVED=turn.interleaved, SOFTCAP=softcap is not None,
            **read.fixed, **sizes,
        )  # fmt: skip
    return _gathered(q, c, layout, read)


def _by_scores(
    q: Tensor, c: Tensor, pattern: Pattern, layout: Layout, bias: Bias | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Sums of latents by queries over latents (B, Hq, Tq, r), r wider than the decode kernel's."""
    heads, queries = q.shape[1:3]
    sizes = latent_tile(q.element_size(), heads * queries, shared_memory(q.device))
    read = _Read(q, c, pattern, layout, bias, sizes["BLOCK_N"])
    with torch.cuda.device_of(q):
        score_latents[cdiv(heads * queries, sizes["BLOCK_M"]), read.tiles, len(q)](
            q, c, read.scores, *read.held, *strides(q), c.stride(0), c.stride(1), c.shape[2],
            read.mask_b, heads, in_base_two(scale, None)[0], *read.bias, queries, *read.numbers,
            **read.fixed, **sizes,
        )  # fmt: skip
    return _gathered(q, c, layout, read)


class _Read:
    """Which tokens a call reads, as the kernels of scores take it, and where scores go."""

    def __init__(self, q, c, pattern: Pattern, layout: Layout, bias: Bias | None, block: int):
        tokens = c.shape[1]
        near, *numbers = predicate(pattern)
        self.head, self.low = worth_reading(pattern, layout, q.shape[2], tokens)
        self.tiles = self.tiles_of(tokens, block)
        held = (layout.start, layout.mask, layout.slots_at, layout.ring)
        params, *self.bias = arguments(bias)
        self.held = (*map(dense_rows, held), params)
        mask = self.held[1]
        self.mask_b = 0 if mask is None or len(mask) == 1 else mask.stride(0)
        where = (layout.tail, layout.tokens(tokens), layout.slots, min(pattern.first, FARTHEST))
        self.numbers = (*where, *numbers, self.head, self.low, tokens)
        self.fixed = dict(NEAR=near, BIAS=BIASES[bias and bias.kind], HEAD=self.head > 0)
        lines = q.shape[1] * q.shape[2]
        self.scores = q.new_empty(len(q), lines, tokens, dtype=torch.float32)

    def tiles_of(self, tokens: int, block: int) -> int:
        """How many tiles of `block` tokens they are."""
        return cdiv(self.head, block) + cdiv(tokens - self.low, block)


def _gathered(q: Tensor, c: Tensor, layout: Layout, read: _Read) -> tuple[Tensor, Tensor]:
    """Sums of latents (B, Hq, Tq, r) in q's dtype by the scores, and the log-sum-exps."""
    lines, (tokens, rank) = q.shape[1] * q.shape[2], c.shape[1:]
    sizes = sum_tile(rank, c.element_size(), lines, shared_memory(q.device))
    row_tiles, pieces = cdiv(lines, sizes["BLOCK_M"]), cdiv(rank, sizes["BLOCK_R"])
    tiles = read.tiles_of(tokens, sizes["BLOCK_N"])
    splits = split(tiles, len(q) * row_tiles * pieces, processors(q.device))
    out, lse, parts, sums = results(q, rank, splits, need_lse=True)
    assert lse is not None  # asked for
    with torch.cuda.device_of(q):
        gather[splits * row_tiles, pieces, len(q)](
            read.scores, c, parts, sums, read.held[0], c.stride(0), c.stride(1), rank, lines,
            row_tiles, layout.slots, layout.tail, read.head, read.low, tokens, tiles,
            cdiv(tiles, splits), HEAD=read.head > 0, **sizes,
        )  # fmt: skip
        if splits > 1:
            merge(parts, sums, out, lse)
    return out, lse


# Tile sizes
# -------------------------------------------------------------------------------------------------


@lru_cache
def key_tile(dim: int, half: int, itemsize: int, lines: int, shared: int) -> dict[str, int]:
    """Those of `score_keys`, for heads of `dim` of which 2 `half` turn and `lines` rows."""
    block_r, block_p = (max(16, power_of_two(x)) for x in (half, dim - 2 * half))
    wide, narrow = max(block_r, block_p) > 64, itemsize == 4
    block_n = (16 if wide else 32) if narrow else (32 if wide else 64)
    return dict(
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        BLOCK_M=16 if narrow else min(max(16, power_of_two(lines)), 32),
        BLOCK_N=block_n,
        BLOCK_K=32 if narrow else 64,
        num_warps=4,
        num_stages=2 if narrow or wide or shared < 6 * TILE_BYTES else 3,
    )


@lru_cache
def latent_tile(itemsize: int, lines: int, shared: int) -> dict[str, int]:
    """Those of `score_latents`."""
    narrow = itemsize == 4
    return dict(
        BLOCK_M=16 if narrow else min(max(16, power_of_two(lines)), 64),
        BLOCK_N=32 if narrow else 64,
        BLOCK_K=32 if narrow else 64,
        num_warps=4,
        num_stages=2 if narrow or shared < 6 * TILE_BYTES else 3,
    )


@lru_cache
def sum_tile(rank: int, itemsize: int, lines: int, shared: int) -> dict[str, int]:
    """Those of `gather`: pieces of at most 128 numbers of a latent."""
    block_r = min(max(16, power_of_two(rank)), 64 if itemsize == 4 else 128)
    block_m = 16 if itemsize == 4 else min(max(16, power_of_two(lines)), 32)
    # more tokens at a time, and registers spill
    most = 32 if itemsize == 4 or block_m > 16 else 64
    return dict(
        BLOCK_R=block_r,
        BLOCK_M=block_m,
        BLOCK_N=min(most, TILE_BYTES // (block_r * itemsize)),
        num_warps=4,
        num_stages=2 if shared < 6 * TILE_BYTES else 3,
    )
