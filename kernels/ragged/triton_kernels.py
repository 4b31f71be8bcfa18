"""Ragged attention in Triton: one split of one head's keys for the queries of its group. See
`effattn.kernels.ragged`; the other letters: `effattn.kernels.decode.triton_pieces`.

Lengths differ by head and are read on the device; the splits are those of the longest head, and
one that begins behind a head's end gives nothing."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode.triton_pieces import dot, finish, soften, tanh

CHANGING = ("queries", "tiles_a_split")


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    begin_ptr,
    of_ptr,
    q_b,
    q_h,
    q_t,
    group,
    row_tiles,
    inner,
    outer,
    queries,
    tiles_a_split,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Normalised output and log-sum-exp of a split; grid (splits * row_tiles, H, B). k (N, D) and v
    (N, DV) have no gaps. inner, outer: as in `effattn.kernels.decode`."""
    split = tl.program_id(0) // row_tiles
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * group

    r = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = r < group * queries
    h = kv_head * group + r // queries
    t = r % queries
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q = tl.load(
        q_ptr + b * q_b + h.to(tl.int64)[:, None] * q_h + t[:, None] * q_t + d[None, :],
        mask=is_row[:, None] & (d < D)[None, :],
        other=0.0,
    )
    segment = tl.load(of_ptr + b) * tl.num_programs(1) + kv_head
    low = tl.load(begin_ptr + segment)
    count = (tl.load(begin_ptr + segment + 1) - low).to(tl.int32)
    k_ptr += low * D
    v_ptr += low * DV

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), highest, tl.zeros([BLOCK_M], tl.float32))
    last = tl.minimum((split + 1) * tiles_a_split, (count + BLOCK_N - 1) // BLOCK_N)
    for tile in range(split * tiles_a_split, last):
        c = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_key = c < count
        c_wide = c.to(tl.int64)[:, None]
        k_mask = is_key[:, None] if D == BLOCK_D else is_key[:, None] & (d < D)[None, :]
        v_mask = is_key[:, None] if DV == BLOCK_DV else is_key[:, None] & (dv < DV)[None, :]
        k = tl.load(k_ptr + c_wide * D + d[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + c_wide * DV + dv[None, :], mask=v_mask, other=0.0)
        s = dot(q, tl.trans(k), None)
        s = tanh(s * inner) * outer if SOFTCAP else s * inner
        sums = soften(sums, tl.where(is_key[None, :], s, float("-inf")), v, None)
    finish(sums, out_ptr, lse_ptr, split, b, h, t, is_row, heads, queries, DV, BLOCK_DV)
