"""Monarch products in Triton: both products in one pass, one of them alone, and the gradients of
the factors.

    N rows   b blocks  M rows, K numbers of a block that are summed over, Q of its results in a tile
    C and G  blocks heard and blocks that hear in a tile      A rank, padded to a power of two

All tensors come with strides, so that a transposed Monarch matrix is the same kernel with other
ones: number k of block i of a row is its feature i·x_i + k·x_k; the sizes of rows (x_size, y_size)
cut off the padding. Tiles are addressed from int64 bases by int32 offsets."""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, narrow


@triton.jit
def _times(a, b, acc):
    """acc + a b of (C, M, K) and (C, K, N). A batch of one is a plain product, acc (M, N): the
    compiler gives each warp products of its own, so that of one product all warps would do the
    same."""
    if a.shape[0] == 1:
        a, b = a.reshape(a.shape[1], a.shape[2]), b.reshape(b.shape[1], b.shape[2])
    return dot(a, b, acc)


@triton.jit(do_not_specialize=["rows"])
def both(
    x,
    first,
    second,
    bias,
    y,
    rows,
    blocks,
    rank,
    inputs,
    outputs,
    x_size,
    y_size,
    x_n,
    x_i,
    x_k,
    f_i,
    f_j,
    f_a,
    f_k,
    s_j,
    s_t,
    s_i,
    s_a,
    y_n,
    y_j,
    y_t,
    M: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
):
    """y[n, j, t] = sum over i, a of second[j, t, i, a] (sum over k of first[i, j, a, k] x[n, i, k])
    + bias.

    One program per tile of rows and G blocks j; all programs of a tile of rows run side by side and
    share its x through the L2 cache. What goes between the products, (C, M, G·A) at a time, stays
    in registers and shared memory: batched products, C and then G of them."""
    at_n, at_j = tl.program_id(1).to(tl.int64) * M, tl.program_id(0) * G
    n, k, t = tl.arange(0, M)[None, :, None], tl.arange(0, K), tl.arange(0, S)[None, None, :]
    i, j = tl.arange(0, C)[:, None, None], tl.arange(0, G)[:, None, None]  # from at_i and at_j on
    to = tl.arange(0, G * A)[None, None, :]  # columns of the first product: (j, a)
    to_j, to_a = to // A, to % A
    of = tl.arange(0, C * A)[None, :, None]  # what the second one sums over: (i, a)
    of_i, of_a = of // A, of % A
    real_n, real_j, real_t = at_n + n < rows, at_j + j < blocks, t < outputs
    real_to = (at_j + to_j < blocks) & (to_a < rank)
    x += at_n * x_n
    first += at_j.to(tl.int64) * f_j
    second += at_j.to(tl.int64) * s_j
    acc = tl.zeros((G, M, S) if G > 1 else (M, S), tl.float32)
    for at_i in range(0, blocks, C):
        real_i = at_i + i < blocks
        first_i, second_i = (
            first + tl.cast(at_i, tl.int64) * f_i,
            second + tl.cast(at_i, tl.int64) * s_i,
        )
        z = tl.zeros((C, M, G * A) if C > 1 else (M, G * A), tl.float32)
        for at_k in range(0, inputs, K):
            kx, kf = (at_k + k)[None, None, :], (at_k + k)[None, :, None]
            feature = (at_i + i) * x_i + kx * x_k
            part = tl.load(
                x + (n * x_n + feature), real_n & real_i & (kx < inputs) & (feature < x_size), 0.0
            )
            place = i * f_i + to_j * f_j + to_a * f_a + kf * f_k
            z = _times(part, tl.load(first_i + place, real_i & (kf < inputs) & real_to, 0.0), z)
        heard = (
            narrow(z, x.dtype.element_ty)
            .reshape(C, M, G, A)
            .permute(2, 1, 0, 3)
            .reshape(G, M, C * A)
        )
        place = j * s_j + of_i * s_i + of_a * s_a + t * s_t
        real = real_j & (at_i + of_i < blocks) & (of_a < rank) & real_t
        acc = _times(heard, tl.load(second_i + place, real, 0.0), acc)
    acc = acc.reshape(G, M, S)
    feature = (at_j + j) * y_j + t * y_t
    real = real_j & real_t & (feature < y_size)
    if bias is not None:
        acc += tl.load(bias + feature, real, 0.0).to(tl.float32)
    tl.store(y + at_n * y_n + (n * y_n + feature), narrow(acc, y.dtype.element_ty), real & real_n)


@triton.jit(do_not_specialize=["rows"])
def one(
    x,
    factor,
    bias,
    y,
    rows,
    inputs,
    results,
    inner,
    x_size,
    y_size,
    x_n,
    x_i,
    x_k,
    f_i,
    f_q,
    f_k,
    y_n,
    y_i,
    y_outer,
    y_inner,
    M: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
):
    """y[n, i, q] = sum over k of factor[i, q, k] x[n, i, k] (+ bias): one block-diagonal product,
    and a permutation.

    Result q of block i goes to feature i·y_i + (q // inner)·y_outer + (q % inner)·y_inner. One
    program per tile of rows and results of one block."""
    i = tl.program_id(1)
    at_n = tl.program_id(2).to(tl.int64) * M
    n, k = tl.arange(0, M)[:, None], tl.arange(0, K)
    q = tl.program_id(0) * Q + tl.arange(0, Q)[None, :]
    real_n = at_n + n < rows
    x += at_n * x_n
    factor += i.to(tl.int64) * f_i
    acc = tl.zeros((M, Q), tl.float32)
    for at_k in range(0, inputs, K):
        kx, kf = (at_k + k)[None, :], (at_k + k)[:, None]
        feature = i * x_i + kx * x_k
        part = tl.load(x + (n * x_n + feature), real_n & (kx < inputs) & (feature < x_size), 0.0)
        acc = dot(
            part, tl.load(factor + (q * f_q + kf * f_k), (q < results) & (kf < inputs), 0.0), acc
        )
    feature = i * y_i + q // inner * y_outer + q % inner * y_inner
    real = (q < results) & (feature < y_size)
    if bias is not None:
        acc += tl.load(bias + feature, real, 0.0).to(tl.float32)
    tl.store(y + at_n * y_n + (n * y_n + feature), narrow(acc, y.dtype.element_ty), real & real_n)


@triton.jit(do_not_specialize=["rows"])
def outer(
    g,
    x,
    out,
    rows,
    results,
    inputs,
    g_size,
    x_size,
    g_n,
    g_i,
    g_q,
    x_n,
    x_i,
    x_k,
    o_i,
    o_q,
    M: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
):
    """out[i, q, k] = sum over n of g[n, i, q] x[n, i, k]: the gradient of a factor, always summed
    in the same order.

    One program per tile of one block's factor.
    """
    i = tl.program_id(2)
    q, k, n = (
        tl.program_id(1) * Q + tl.arange(0, Q),
        tl.program_id(0) * K + tl.arange(0, K),
        tl.arange(0, M),
    )
    of_g, of_x = i * g_i + q * g_q, i * x_i + k * x_k
    real_g, real_x = (q < results) & (of_g < g_size), (k < inputs) & (of_x < x_size)
    acc = tl.zeros((Q, K), tl.float32)
    for _ in range(0, tl.cdiv(rows, M)):
        real = n < rows
        left = tl.load(g + (n[None, :] * g_n + of_g[:, None]), real[None, :] & real_g[:, None], 0.0)
        right = tl.load(
            x + (n[:, None] * x_n + of_x[None, :]), real[:, None] & real_x[None, :], 0.0
        )
        acc = dot(left, right, acc)
        g += M * g_n
        x += M * x_n
        rows -= M
    place = i.to(tl.int64) * o_i + q[:, None] * o_q + k[None, :]
    tl.store(
        out + place,
        narrow(acc, out.dtype.element_ty),
        (q < results)[:, None] & (k < inputs)[None, :],
    )
