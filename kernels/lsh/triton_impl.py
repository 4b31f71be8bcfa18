"""LSH attention on Triton, forward and backward: the launches, and the tiles they run with.

Sorting is torch's; from then on rows of q, k and v are read where they are. See `triton_kernels`
for the kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flash.tiles import WIDEST, architecture, padded
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv
from ..rows import dense_rows
from . import triton_backward, triton_kernels
from .places import Places

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """Queries and keys of a tile, warps and stages."""

    m: int
    n: int
    warps: int
    stages: int


# kernel -> architecture -> widest head -> tile; chosen by what the compiler reports, as in
# `flash.tiles`.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "forward": {
        "sm_80": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_90": {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "sm_100": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "gfx942": {64: Tile(64, 32, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    },
    "backward_queries": {
        "sm_80": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 8, 1)},
        "sm_90": {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_100": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "gfx942": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    },
    "backward_keys": {
        "sm_80": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_90": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "sm_100": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "gfx942": {64: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    },
}
FLOAT32: dict[int, Tile] = {
    64: Tile(32, 32, 4, 1),
    128: Tile(16, 32, 4, 1),
    256: Tile(16, 16, 8, 1),
}
INTERPRETED = Tile(32, 32, 1, 1)
ROWS = 16  # of `combine` and `backward_own`, which have no products


def constants(
    kernel: str, arch: str, dtype: torch.dtype, dim: int, value_dim: int
) -> dict[str, Any]:
    """The compile-time arguments of a launch that follow from sizes, num_warps and num_stages among
    them.
    """
    fixed = dict(D=dim, V=value_dim, BLOCK_D=padded(dim), BLOCK_V=padded(value_dim))
    if kernel not in TILES:
        return fixed | dict(BLOCK=ROWS, num_warps=4, num_stages=1)
    width = max(fixed["BLOCK_D"], fixed["BLOCK_V"])
    if width > WIDEST:
        raise ValueError(f"head size: got {max(dim, value_dim)}, valid are 1 to {WIDEST}")
    tile = INTERPRETED
    if arch != "interpreted":
        table = (
            FLOAT32 if dtype == torch.float32 else TILES[kernel].get(arch, TILES[kernel]["sm_80"])
        )
        tile = table[min(size for size in table if width <= size)]
    return fixed | dict(
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages
    )


def attention(q: Tensor, k: Tensor, v: Tensor, places: Places, *, scale: float) -> Tensor:
    """As `effattn.kernels.lsh.attention`: (B, Hq, Tq, Dv) in q's dtype. fp16, bf16 or fp32, heads
    up to 256 wide.
    """
    if q.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {q.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    out = _Attention.apply(*map(dense_rows, (q, k, v)), places, scale)
    return out if places.real is None else torch.where(places.real[:, None, :, None], out, 0.0)


class _Sorted(NamedTuple):
    """The places as the kernels take them, int32: (P, R, L), (P, R, N), (P, R, M) and so on."""

    order: Tensor
    code: Tensor
    query_order: Tensor
    query_code: Tensor
    low: Tensor
    high: Tensor

    def tiles(self, places: Places, size: int) -> tuple[Tensor, Tensor]:
        """[begin, end) of the sorted queries of each tile of at most `size`, int32 (P, R, tiles);
        padding has none.

        As many as there can be: each bucket may leave its last one unfilled. The others are empty.
        """
        begin = places.query_begin.flatten(0, 1)
        # of each bucket, tile
        last = (begin.diff(dim=2) + size - 1).div(size, rounding_mode="floor").cumsum(dim=2)
        most = cdiv(self.low.shape[2], size) + min(places.rule.buckets, self.low.shape[2])
        # the interpreter takes long for empty ones, and a look costs nothing here
        if begin.device.type == "cpu":
            most = int(last[..., -1].max())
        tile = torch.arange(most, device=begin.device).expand(*begin.shape[:2], -1).contiguous()
        bucket = torch.searchsorted(last, tile, right=True)
        before = torch.nn.functional.pad(last, (1, 0)).gather(2, bucket)
        first = begin.gather(2, bucket) + (tile - before) * size
        end = torch.nn.functional.pad(begin[..., 1:], (0, 1), value=0).gather(2, bucket)
        return first.int(), torch.minimum(first + size, end).int()

    def reach(self, keys: int) -> tuple[Tensor, Tensor]:
        """The sorted queries [begin, end) that see some of each tile of `keys` sorted keys, int32
        (P, R, tiles).
        """
        length, order = self.order.shape[2], self.query_order.long()
        first = torch.arange(0, length, keys, device=order.device, dtype=torch.int32)
        last = (first + keys - 1).clamp(max=length - 1)
        ends = []
        for x, bound in ((self.high, first), (self.low, last)):
            x, bound = x.gather(2, order), bound.expand(*order.shape[:2], -1).contiguous()
            ends.append(torch.searchsorted(x, bound, right=True, out_int32=True))
        return ends[0], torch.maximum(*ends)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, places, scale):
        names = _Sorted._fields
        given = _Sorted(*(getattr(places, name).flatten(0, 1).int().contiguous() for name in names))
        (lines, rounds, rows), value_dim = given.low.shape, v.shape[-1]
        arch, dim = architecture(q.device), q.shape[-1]
        out = q.new_empty(*q.shape[:3], value_dim)
        lse = torch.empty((lines, rows), dtype=torch.float32, device=q.device)
        parts = torch.empty((rounds, lines, rows, value_dim), dtype=torch.float32, device=q.device)
        sums = torch.full((rounds, lines, rows), -torch.inf, device=q.device)
        unit, heads, group = scale * LOG2E, k.shape[1], places.group
        strides = [step for x in (q, k, v) for step in x.stride()[:3]]
        with torch.cuda.device_of(q):
            fixed = constants("forward", arch, q.dtype, dim, value_dim)
            begin, end = given.tiles(places, fixed["BLOCK_M"])
            _launch(
                "forward", begin.numel(),
                q, k, v, *given, begin, end, parts, sums,
                *strides,
                unit, heads, group, rows, given.order.shape[2], given.code.shape[2], places.own,
                places.rule.buckets, begin.shape[2],
                ROUNDS=rounds, CAUSAL=places.causal, **fixed,
            )  # fmt: skip
            fixed = constants("combine", arch, q.dtype, dim, value_dim)
            _launch(
                "combine", lines * cdiv(rows, fixed["BLOCK"]),
                q, k, v, parts, sums, out, lse,
                *strides, *out.stride()[:3],
                unit, heads, group, rows, places.own,
                ROUNDS=rounds, SHARED=places.rule.shared_qk, **fixed,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, *given)
        ctx.places, ctx.scale = places, scale
        return out

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad):
        q, k, v, out, lse, *given = ctx.saved_tensors
        given, places, scale = _Sorted(*given), ctx.places, ctx.scale
        (lines, rounds, rows), length, store = (
            given.low.shape,
            given.order.shape[2],
            given.code.shape[2],
        )
        arch, dim, value_dim = architecture(q.device), q.shape[-1], v.shape[-1]
        grad = dense_rows(grad)
        heads, group, unit = k.shape[1], places.group, scale * LOG2E

        # One for the own keys, and one a round; zero, since not every row is in every round, and
        # padding in none.
        dq, dk, dv = (
            torch.zeros((rounds + 1, lines, *shape), dtype=torch.float32, device=q.device)
            for shape in ((rows, dim), (store, dim), (store, value_dim))
        )
        delta = torch.empty_like(lse)
        strides = [step for x in (q, k, v) for step in x.stride()[:3]]
        numbers = (scale, unit, heads, group, rows, length, store, places.own, places.rule.buckets)
        shared = dict(ROUNDS=rounds, CAUSAL=places.causal)
        with torch.cuda.device_of(q):
            fixed = constants("backward_own", arch, q.dtype, dim, value_dim)
            _launch(
                "backward_own", lines * cdiv(rows // group, fixed["BLOCK"]),
                q, k, v, out, grad, lse, delta, dq[0], dk[0], dv[0],
                *strides, *out.stride()[:3], *grad.stride()[:3],
                scale, unit, heads, group, rows, store, places.own,
                SHARED=places.rule.shared_qk, **fixed,
            )  # fmt: skip
            fixed = constants("backward_queries", arch, q.dtype, dim, value_dim)
            begin, end = given.tiles(places, fixed["BLOCK_M"])
            _launch(
                "backward_queries", begin.numel(),
                q, k, v, *given, begin, end, grad, lse, delta, dq[1:],
                *strides, *grad.stride()[:3],
                *numbers, begin.shape[2],
                **shared, **fixed,
            )  # fmt: skip
            fixed = constants("backward_keys", arch, q.dtype, dim, value_dim)
            begin, end = given.reach(fixed["BLOCK_N"])
            _launch(
                "backward_keys", begin.numel(),
                q, k, v, *given, begin, end, grad, lse, delta, dk[1:], dv[1:],
                *strides, *grad.stride()[:3],
                *numbers, begin.shape[2],
                **shared, **fixed,
            )  # fmt: skip
        dq = dq.sum(dim=0).view(q.shape[0], heads, -1, group, dim).transpose(2, 3).reshape(q.shape)
        dk, dv = (x.sum(dim=0).view(y.shape) for x, y in ((dk, k), (dv, v)))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def jitted(kernel: str) -> Any:
    """A kernel by its name."""
    return getattr(triton_kernels, kernel, None) or getattr(triton_backward, kernel)


def _launch(kernel: str, programs: int, *arguments, **fixed) -> None:
    if programs:  # a grid of none is an error
        jitted(kernel)[(programs,)](*arguments, **fixed, enable_fp_fusion=True)
