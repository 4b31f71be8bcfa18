"""Monarch products in Triton: which launches, with which tiles, and gradients. Letters as in
`effattn.kernels.monarch`.

From 64 rows on, both products run in one launch and what goes between them never leaves the chip,
where a tile fits: blocks of at most 256 outputs, ranks of at most 64. Otherwise, and below 64 rows,
where a launch of one product spreads over more of the device, there are two, with those numbers in
memory.

Backward: the intermediate numbers are computed again. The gradient of x is the transposed Monarch
matrix's product: the same kernels with other strides. Gradients of the factors sum over the rows
inside of one program, in a fixed order."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..launching import Constants, constants, launch
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from . import triton_kernels as kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSED_ROWS = 64
WIDEST, HIGHEST = 256, 64  # outputs of a block and rank that `both` takes
ACCUMULATORS = 4608  # of both products in a warp of `both`: 144 registers a thread
FACTOR = 2048  # numbers of the second factor in a warp


def linear(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """x (N, n) -> (N, out_features). ValueError for other dtypes than float16, bfloat16 and
    float32.
    """
    tensors = [each for each in (x, right, left, bias) if each is not None]
    if len({each.dtype for each in tensors}) > 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"monarch: got {', '.join(str(each.dtype) for each in tensors)}; the Triton kernels "
            "take one of float16, bfloat16 and float32; impl='torch' takes float64 too"
        )
    return _Linear.apply(x, right, left, dense_rows(bias), out_features)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, right, left, bias, out_features):
        ctx.save_for_backward(x, right, left)
        ctx.has_bias = bias is not None
        return forward(x, right, left, bias, out_features)

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, dy):
        x, right, left = ctx.saved_tensors
        want_x, want_right, want_left, want_bias, _ = ctx.needs_input_grad
        dx, dright, dleft = backward(dy, x, right, left, want_x, want_right, want_left)
        return dx, dright, dleft, dy.sum(0) if want_bias and ctx.has_bias else None, None


class Factors(NamedTuple):
    """A Monarch matrix as the kernels see it: its factors by (block, row, column) of `first` (i,
    (j, a), k), and of `second` (j, t, (i, a)); where number k of input block i and number t of
    output block j are in a row."""

    first: Tensor
    second: Tensor
    inputs: tuple[int, int]  # strides of i and k
    outputs: tuple[int, int]  # strides of j and t

    @property
    def blocks(self) -> int:
        """b."""
        return self.first.shape[0]

    @property
    def rank(self) -> int:
        """r, of a pair of blocks."""
        return self.first.shape[1] // self.blocks


def factors(right: Tensor, left: Tensor) -> Factors:
    """Of the matrix itself, P L P' R."""
    return Factors(right, left, (right.shape[2], 1), (1, left.shape[0]))


def transposed(right: Tensor, left: Tensor) -> Factors:
    """Of the transposed matrix, R' P L' P'."""
    return Factors(
        left.transpose(1, 2), right.transpose(1, 2), (1, left.shape[0]), (right.shape[2], 1)
    )


def forward(
    x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """The product, without gradients."""
    matrix = factors(right, left)
    if len(x) >= FUSED_ROWS and fits(matrix):
        return in_one_pass(x, matrix, bias, out_features)
    return _second(_first(x, matrix), matrix, bias, out_features)


def backward(dy, x, right, left, want_x: bool, want_right: bool, want_left: bool):
    """The gradients of x, right and left; None for those that are not wanted."""
    dx = dright = dleft = None
    matrix = transposed(right, left)
    if want_x and not want_right and len(x) >= FUSED_ROWS and fits(matrix):
        return (
            in_one_pass(dy, matrix, None, x.shape[1]),
            None,
            _left_gradient(dy, x, right, left, want_left),
        )
    if want_x or want_right:
        dz = _first(dy, matrix)
        dx = _second(dz, matrix, None, x.shape[1]) if want_x else None
        dright = (
            _factor_gradient(dz, right.shape[1], 1, x, (right.shape[2], 1), right)
            if want_right
            else None
        )
    dleft = _left_gradient(dy, x, right, left, want_left)
    return dx, dright, dleft


def fits(matrix: Factors) -> bool:
    """Whether `both` has a tile for these sizes."""
    return matrix.second.shape[1] <= WIDEST and matrix.rank <= HIGHEST


def _first(x: Tensor, matrix: Factors) -> Tensor:
    """The intermediate numbers (N, j, (i, a)), as (N, b·b·r)."""
    inner, rank = matrix.first.shape[1], matrix.rank
    z = x.new_empty(len(x), matrix.blocks * inner)
    return _one(x, matrix.first, matrix.inputs, None, z, rank, (rank, inner, 1))


def _second(z: Tensor, matrix: Factors, bias: Tensor | None, out_features: int) -> Tensor:
    y = z.new_empty(len(z), out_features)
    of_block, of_number = matrix.outputs
    return _one(z, matrix.second, (matrix.first.shape[1], 1), bias, y, 1, (of_block, of_number, 0))


def _left_gradient(dy, x, right, left, wanted: bool) -> Tensor | None:
    if not wanted:
        return None
    z = _first(x, factors(right, left))
    return _factor_gradient(dy, 1, left.shape[0], z, (left.shape[2], 1), left)


# ---- launches


def in_one_pass(x: Tensor, matrix: Factors, bias: Tensor | None, out_features: int) -> Tensor:
    """y (N, out_features)."""
    x, rows = dense_rows(x), len(x)
    y = x.new_empty(rows, out_features)
    blocks, rank, first, second = matrix.blocks, matrix.rank, matrix.first, matrix.second
    tile = one_pass_tile(second.shape[1], rank, x.element_size(), shared_memory(x.device))
    f_i, f_row, f_k = first.stride()
    s_j, s_t, s_column = second.stride()
    grid = (cdiv(blocks, tile["G"]), cdiv(rows, tile["M"]), 1)
    with torch.cuda.device_of(x):
        sizes = rows, blocks, rank, first.shape[2], second.shape[1], x.shape[1], out_features
        of_first = f_i, rank * f_row, f_row, f_k
        of_second = s_j, s_t, rank * s_column, s_column
        steps = x.stride(0), *matrix.inputs, *of_first, *of_second, out_features, *matrix.outputs
        launch(kernels.both, grid, (x, first, second, bias, y, *sizes, *steps), tile)
    return y


def _one(x, factor, inputs, bias, y, inner: int, outputs: tuple[int, int, int]) -> Tensor:
    """One block-diagonal product, into y (N, …)."""
    x, rows = dense_rows(x), len(x)
    if not rows:
        return y
    blocks, results, count = factor.shape
    tile = product_tile(rows, results, count, x.element_size())
    grid = (cdiv(results, tile["Q"]), blocks, cdiv(rows, tile["M"]))
    with torch.cuda.device_of(x):
        sizes = rows, count, results, inner, x.shape[1], y.shape[1]
        steps = x.stride(0), *inputs, *factor.stride(), y.stride(0), *outputs
        launch(kernels.one, grid, (x, factor, bias, y, *sizes, *steps), tile)
    return y


def _factor_gradient(
    g: Tensor, g_i: int, g_q: int, x: Tensor, inputs: tuple[int, int], factor: Tensor
) -> Tensor:
    """sum over rows of g[n, i·g_i + q·g_q] x[n, i·inputs[0] + k·inputs[1]], in the shape of
    `factor` (i, q, k).
    """
    g, x, rows = dense_rows(g), dense_rows(x), len(x)
    blocks, results, count = factor.shape
    out = torch.empty_like(factor, memory_format=torch.contiguous_format)
    tile = gradient_tile(x.element_size())
    grid = (cdiv(count, tile["K"]), cdiv(results, tile["Q"]), blocks)
    with torch.cuda.device_of(x):
        sizes = rows, results, count, g.shape[1], x.shape[1]
        steps = g.stride(0), g_i, g_q, x.stride(0), *inputs, *out.stride()[:2]
        launch(kernels.outer, grid, (g, x, out, *sizes, *steps), tile)
    return out


# ---- tiles


@lru_cache
def one_pass_tile(outputs: int, rank: int, itemsize: int, shared: int) -> Constants:
    """Keyword arguments of `both`: blocks of so many outputs, a rank, a device with `shared` bytes
    for a program.

    A and the blocks taken at once make at least 16 columns, the least of a matrix unit; and there
    is a block, or more, for each warp. Where the second factor's tile would not leave registers for
    the rest, and for high ranks, it is one block at a time, the rank padded to 16."""
    size, a = max(16, power_of_two(outputs)), power_of_two(rank)
    at_once = 16 // a if a < 4 else 4
    warps, small = min(at_once, 8), shared < 2**17
    if at_once * at_once * a * size > FACTOR * warps or a > 8:
        at_once, a, warps = 1, max(a, 16), 8
    of_row = at_once * size + at_once * at_once * a
    most = warps * ACCUMULATORS // (4 if itemsize == 4 else 1)
    fit = [m for m in (128, 64, 32, 16) if m * of_row <= most]
    m, k = (fit or [16])[0], 32 if itemsize == 2 and at_once < 16 else 16
    return constants(
        M=m,
        K=k,
        S=size,
        C=at_once,
        G=at_once,
        A=a,
        num_warps=warps,
        num_stages=1 if small or at_once == 16 else 2,
    )


@lru_cache
def product_tile(rows: int, results: int, inputs: int, itemsize: int) -> Constants:
    """Keyword arguments of `one`. Few rows: narrow tiles, so that the factor is read by many
    programs.
    """
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    q = min(32 if m < 64 else 64, max(16, power_of_two(results)))
    k = min(64 if itemsize == 2 else 32, max(16, power_of_two(inputs)))
    return constants(M=m, K=k, Q=q, num_warps=4, num_stages=3 if itemsize == 2 else 2)


@lru_cache
def gradient_tile(itemsize: int) -> Constants:
    """Keyword arguments of `outer`."""
    if itemsize == 2:
        return constants(M=32, K=64, Q=64, num_warps=4, num_stages=2)
    return constants(M=16, K=32, Q=32, num_warps=4, num_stages=1)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; small where only the interpreter runs."""
    if device.type != "cuda":
        return 64 * 1024
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", None) or found.shared_memory_per_block
