"""What the linear kernels share: features and their derivatives, and the weights of pairs, chunks
and states.

Legend in `triton_kernels`.
"""

import triton
import triton.language as tl

from ..flash.triton_pieces import dot, load_rows, narrow

# column by column
IDENTITY, ELU, RELU, RELU2 = (tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3))
FAVOR, FAVOR_RELU = tl.constexpr(4), tl.constexpr(5)  # from all of x and directions
EPSILON = tl.constexpr(1e-3)
LOWEST = tl.constexpr(-30.0)  # as in `features`
NOTHING = tl.constexpr(1e-30)  # so small a normaliser counts as none
LOG2E = tl.constexpr(1.4426950408889634)

# ---- features


@triton.jit
def exponents(
    x, directions, f, F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr
):
    """x W^T for BLOCK_F directions from f on."""
    w = load_rows(directions, f, D, F, D, BLOCK_F, BLOCK_D, F % BLOCK_F != 0)
    return dot(x.to(w.dtype), tl.trans(w), None)


@triton.jit
def whole(
    base,
    row,
    stride,
    real,
    MAP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All of x, if features are made from that; otherwise something that nobody reads: Triton 3.6
    compiles no jitted function that returns None.
    """
    if MAP >= FAVOR:
        return load_real(base, row, stride, real, D, ROWS, BLOCK_D)
    else:
        return real


@triton.jit
def columns(
    x,
    base,
    row,
    stride,
    real,
    f,
    MAP: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """What features from f on are made from: `whole`, or these columns of x."""
    if MAP >= FAVOR:
        return x
    else:
        r, d = tl.arange(0, ROWS)[:, None], f + tl.arange(0, BLOCK_F)[None, :]
        found = real[:, None] & (d < F) if F % BLOCK_F != 0 else real[:, None]
        return tl.load(
            base + tl.cast(row, tl.int64) * stride + (r * stride + d), mask=found, other=0.0
        )


@triton.jit
def features(
    x,
    directions,
    top,
    f,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """phi (rows, BLOCK_F) fp32, features from f on, from their `columns`; 0 beyond F. `top`: see
    `tops`.
    """
    if MAP >= FAVOR:
        u = exponents(x, directions, f, F, D, BLOCK_F, BLOCK_D)
        phi = (
            tl.exp2(tl.maximum(u - top[:, None], LOWEST) * LOG2E)
            if MAP == FAVOR
            else tl.maximum(u, 0.0) + EPSILON
        )
    else:
        y = x.to(tl.float32)
        if MAP == ELU:
            phi = tl.where(y > 0, y + 1, tl.exp2(tl.minimum(tl.maximum(y, LOWEST), 0.0) * LOG2E))
        elif MAP == RELU:
            phi = tl.maximum(y, 0.0)
        elif MAP == RELU2:
            phi = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
        else:
            phi = y
    if F % BLOCK_F != 0 and (MAP >= FAVOR or MAP == ELU):  # the others are 0 there
        phi = tl.where(f + tl.arange(0, BLOCK_F)[None, :] < F, phi, 0.0)
    return phi


@triton.jit
def gradient_of_columns(x, phi, d_phi, MAP: tl.constexpr):
    """dx of features made column by column."""
    if MAP == ELU:
        return d_phi * tl.minimum(phi, 1.0)
    elif MAP == RELU:
        return tl.where(phi > 0, d_phi, 0.0)
    elif MAP == RELU2:
        return d_phi * 2 * tl.maximum(x.to(tl.float32), 0.0)
    else:
        return d_phi


@triton.jit
def add_gradient(
    acc,
    inner_sum,
    phi,
    d_phi,
    directions,
    f,
    MAP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """acc (rows, BLOCK_D) plus dx of features from f on, made from directions; inner_sum (rows,)
    plus sum phi d phi.
    """
    w = load_rows(directions, f, D, F, D, BLOCK_F, BLOCK_D, F % BLOCK_F != 0)
    inner = phi * d_phi if MAP == FAVOR else tl.where(phi > EPSILON, d_phi, 0.0)
    dtype: tl.constexpr = directions.dtype.element_ty
    return dot(wide(inner, dtype), wide(w, dtype), acc), inner_sum + tl.sum(inner, 1)


@triton.jit
def save_columns(
    x, base, row, stride, rows, f, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Writes x (ROWS, BLOCK_F) from row `row` and column f on, what exists of it."""
    r, d = tl.arange(0, ROWS)[:, None], f + tl.arange(0, BLOCK_F)[None, :]
    pointers = base + tl.cast(row, tl.int64) * stride + (r * stride + d)
    tl.store(pointers, narrow(x, base.dtype.element_ty), mask=(row + r < rows) & (d < F))


@triton.jit
def wide(x, dtype: tl.constexpr):
    """x in the type of products whose range has no bound: fp32 where the inputs (`dtype`) are, bf16
    otherwise.
    """
    if dtype == tl.float32 or x.dtype == tl.bfloat16:
        return x
    else:
        return narrow(x.to(tl.float32), tl.bfloat16)


@triton.jit
def factor_of(phi, dtype: tl.constexpr, MAP: tl.constexpr):
    """Features as a factor of a pair's product: in the inputs' type where they are no larger or
    smaller than inputs.
    """
    if MAP == IDENTITY or MAP == RELU:  # noqa: SIM109
        return narrow(phi, dtype)
    else:
        return wide(phi, dtype)


@triton.jit
def share_of(total):
    """One over the normaliser, 0 where nothing counts."""
    nothing = tl.abs(total) < NOTHING
    return tl.where(nothing, 0.0, 1 / tl.where(nothing, 1.0, total))


# ---- weights


@triton.jit
def ratio(high, low):
    """exp(high - low), at most 1; 0 if high is -inf."""
    # nothing was there: `high` says so too, or is not asked
    low = tl.where(low == float("-inf"), 0.0, low)
    return tl.where(high == float("-inf"), 0.0, tl.exp2(tl.minimum(high - low, 0.0) * LOG2E))


@triton.jit
def real_keys(mask, at, tokens):
    """Which tokens exist, and are no padding. `mask`: of the row, or None."""
    return at < tokens if mask is None else tl.load(mask + at, mask=at < tokens, other=0) != 0


@triton.jit
def load_real(
    base, row, stride, real, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS rows from `row` on; 0 for those that are not real, whatever padding holds."""
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    found = real[:, None] & (d < WIDTH) if WIDTH < COLUMNS else real[:, None]
    return tl.load(base + tl.cast(row, tl.int64) * stride + (r * stride + d), mask=found, other=0.0)


@triton.jit
def pair_weights(at_q, at_k, real, mu, high, rate):
    """w (queries, keys): 0 where a query sees no key. mu of the keys, high of the queries, rate of
    a head, or None.
    """
    away = at_q[:, None] - at_k[None, :]
    seen = (away >= 0) & real[None, :]
    if rate is not None:
        return tl.where(seen, tl.exp2(tl.maximum(away, 0).to(tl.float32) * rate), 0.0)
    elif mu is not None:
        return tl.where(seen, ratio(mu[None, :], high[:, None]), 0.0)
    else:
        return tl.where(seen, 1.0, 0.0)


@triton.jit
def into_weights(i, high, before, rate):
    """What a query, the i-th of its chunk, makes of the state before the chunk: (queries,), or
    1.0.
    """
    if rate is not None:
        return tl.exp2((i + 1).to(tl.float32) * rate)
    elif high is not None:
        return ratio(before, high)
    else:
        return i.to(tl.float32) * 0 + 1


@triton.jit
def after_weights(i, size, real, mu, end, rate):
    """What is left of a key, the i-th of its chunk of `size`, at the chunk's end: (keys,)."""
    if rate is not None:
        return tl.where(real, tl.exp2((size - 1 - i).to(tl.float32) * rate), 0.0)
    elif mu is not None:
        return tl.where(real, ratio(mu, end), 0.0)
    else:
        return tl.where(real, 1.0, 0.0)


@triton.jit
def row_of(base, row, tokens, at):
    """A row of a (B H, T) fp32 tensor; 0 beyond its end."""
    return tl.load(base + tl.cast(row, tl.int64) * tokens + at, mask=at < tokens, other=0.0)


@triton.jit
def norms_of(norms, place, f, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """BLOCK_F entries of a row of (.., F), from f on; 0 beyond F."""
    at = f + tl.arange(0, BLOCK_F)
    return tl.load(norms + place * F + at, mask=at < F, other=0.0)
