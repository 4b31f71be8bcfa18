"""Attention over a packed cache in Triton: what to read, how to split it, one launch (and one to
combine splits).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..flash.pattern import Blocks, Pattern
from ..flash.rules import Bias
from ..flash.triton_bias import BIASES, arguments
from ..launching import Constants, constants, launch
from ..pack.codes import Codes, Coding
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from .packed_cache import PackedCache
from .packed_kernels import attend_packed
from .triton_impl import (
    DTYPES,
    FARTHEST,
    WIDEST,
    in_base_two,
    merge,
    predicate,
    processors,
    results,
    shared_memory,
    split,
    strides,
    twin,
)
from .turn import Turn

MOST_PIECES = 8
PAIRS = torch.version.hip is None and not triton.knobs.runtime.interpret
LONGEST = 128  # keys of a tile
CODES_AT_ONCE = 2**13  # numbers of K, and of V, in a tile


def attention(
    q: Tensor,
    cache: PackedCache,
    pattern: Pattern,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    turn: Turn | None,
    bias: Bias | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `packed.attention`. Any strides but the last one's are free: a part of a cache is not
    copied.
    """
    _check(q, cache, turn)
    batch, heads, queries, dim = q.shape
    kv_heads, value_dim = cache.v.shape[1], cache.v.dim
    group = heads // kv_heads
    tiles_fit = whole(cache.k.coding, cache.v.coding)
    k_code = code(cache.k.coding, cache.k.dim, _half(turn), tiles_fit)
    v_code = code(cache.v.coding, cache.v.dim, None, tiles_fit)
    more = sum(x is not None for x in (q_first, turn, bias))
    lines, shared, itemsize = group * queries, shared_memory(q.device), q.element_size()
    sizes = tile(cache.k.coding, cache.v.coding, dim, value_dim, itemsize, lines, shared, more)
    flags = causal, softcap is not None, cache.slots > 0, bias and bias.kind
    fixed = _constants(k_code, v_code, turned(turn), type(pattern), flags, tuple(sizes.items()))

    slots, packed, rest = cache.slots, cache.k.tokens, cache.k_rest.shape[2]
    low, rest_low = worth_reading(cache, pattern, queries, sizes["BLOCK_N"])
    packed_tiles = cdiv(packed - low, sizes["BLOCK_N"])
    tiles = packed_tiles + cdiv(slots + rest - rest_low, sizes["BLOCK_F"])
    row_tiles = cdiv(lines, sizes["BLOCK_M"])
    splits = split(tiles, batch * kv_heads * row_tiles, processors(q.device))
    out, lse, parts, sums = results(q, value_dim, splits, need_lse)
    total, total_at = (0, cache.total) if isinstance(cache.total, Tensor) else (cache.total, None)

    q, q_first, q_far = dense_rows(q), dense_rows(q_first), dense_rows(turn.q_far if turn else None)
    k, v = codes_and_scales(cache.k, k_code[-1]), codes_and_scales(cache.v, v_code[-1])
    full = [dense_rows(x) for x in (cache.k_rest, cache.v_rest, cache.k_first, cache.v_first)]
    mask = dense_rows(cache.mask)
    mask_b = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    held = [dense_rows(x) for x in (cache.start, mask, cache.packed_numbers, cache.rest_numbers)]
    inv_freq, scaling, window, slow = _turning(turn, q.device)
    params, step, n_params = arguments(bias)
    steps = [x for y in (q, q_first, q_far, k[0], k[1], v[0], v[1], *full) for x in strides(y)]
    with torch.cuda.device_of(q):
        tensors = q, q_first, q_far, *k, *v, *full, parts, sums, *held, total_at, inv_freq, params
        units = mask_b, group, row_tiles, *in_base_two(scale, softcap), step, n_params
        numbers = (
            *(queries, total, slots, min(pattern.first, FARTHEST), *predicate(pattern)[1:]),
            *(cache.packed_from, packed, rest, low, rest_low),
            *(packed_tiles, tiles, cdiv(tiles, splits), scaling, window, slow),
        )
        grid = splits * row_tiles, kv_heads, batch
        launch(attend_packed, grid, (*tensors, *steps, *units, *numbers), fixed)
        if splits > 1:
            merge(parts, sums, out, lse)
    return out, lse


@lru_cache
def _constants(
    k_code: tuple, v_code: tuple, turn: tuple | None, pattern: type, flags: tuple, sizes: tuple
) -> Constants:
    """What `attend_packed` is compiled for; flags: causal, softcap, slots, the bias."""
    causal, softcap, slots, bias = flags
    return constants(
        K_CODE=k_code,
        V_CODE=v_code,
        TURN=turn,
        NEAR=twin(pattern),
        CAUSAL=causal,
        SOFTCAP=softcap,
        SLOTS=slots,
        BIAS=BIASES[bias],
        **dict(sizes),
    )


def _check(q: Tensor, cache: PackedCache, turn: Turn | None) -> None:
    """ValueError for what the kernel cannot do and plain torch can."""
    dim, value_dim = cache.k.dim, cache.v.dim
    if q.dtype not in DTYPES or max(dim, value_dim) > WIDEST:
        raise ValueError(
            f"packed attention: got {q.dtype} with head dimensions {dim} and {value_dim}; the "
            f"Triton kernel takes float16, bfloat16 and float32 with at most {WIDEST}, "
            "impl='torch' takes all"
        )
    for side, x in (("k", cache.k), ("v", cache.v)):
        pieces = code(x.coding, x.dim, _half(turn) if side == "k" else None)[7]
        if pieces > MOST_PIECES or (x.coding.axis == "channel" and x.coding.group % 16):
            raise ValueError(
                f"packed attention: {side} has groups of {x.coding.group} per {x.coding.axis} at "
                f"head dimension {x.dim}; the Triton kernel takes multiples of 16 per channel and "
                f"at most {MOST_PIECES} pieces per token, impl='torch' takes all"
            )
    if turn is not None:
        half, width = _half(turn), code(cache.k.coding, dim, _half(turn))[5]
        if turn.interleaved or half % width or dim % width:
            raise ValueError(
                f"turn: got {half} frequencies, {'interleaved, ' if turn.interleaved else ''}at "
                f"head dimension {dim}; the Triton kernel takes halves that are whole pieces of "
                f"{width} channels, impl='torch' takes all"
            )
    if q.requires_grad and torch.is_grad_enabled():
        raise ValueError("packed attention: there are no gradients; valid is torch.no_grad()")


def _turning(turn: Turn | None, device: torch.device) -> tuple[Tensor | None, float, int, float]:
    """Frequencies, scaling, window and slowness, as the kernel takes them where keys turn."""
    if turn is None:
        return None, 1.0, 0, 1.0
    slow = 1.0 if math.isinf(turn.slow) else float(turn.slow)
    inv_freq = turn.inv_freq.to(device, torch.float32)
    return inv_freq, float(turn.scaling), turn.window or 0, slow


def _half(turn: Turn | None) -> int | None:
    return None if turn is None else len(turn.inv_freq)


@lru_cache
def code(
    coding: Coding, dim: int, half: int | None = None, whole: bool = False, pairs: bool = PAIRS
) -> tuple:
    """A `CODE` of the kernel: (bits, is fp8, has zeros, per channel, group, W, BLOCK_W, blocks,
    STEP, pairs, scales of two tokens at once).

    Blocks of channels are as wide as one plane and one group, and as `half`, those that turn. STEP:
    bytes at once, two where blocks are wide enough for matrix units then. whole: tiles of keys are
    never cut. pairs: registers are shifted two words at once."""
    width = dim // coding.planes
    if coding.axis == "token":
        width = math.gcd(width, coding.group)
    if half is not None:
        width = math.gcd(width, half)
    block = max(16, power_of_two(width))
    step = 2 if half is None and width % 2 == 0 and block >= 32 else 1
    fp8, channel = coding.kind == "fp8", coding.axis == "channel"
    return (
        *(coding.bits, fp8, coding.has_zero, channel, coding.group),
        *(width, block, dim // width, step, pairs),
        whole and not channel and coding.group == dim,
    )


def whole(k: Coding, v: Coding) -> bool:
    """Whether packed tokens are a whole number of tiles, as tiles lie in one group."""
    return "channel" in (k.axis, v.axis)


def turned(turn: Turn | None) -> tuple | None:
    """The kernel's `TURN`."""
    return None if turn is None else (len(turn.inv_freq), not math.isinf(turn.slow))


def codes_and_scales(x: Codes, by_two: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the kernel reads them: zeros lie as scales do, and pairs of what it takes two at once
    begin at multiples of their size. by_two: scales of two tokens are a pair."""
    codes, scale, zero = (_even(dense_rows(y), by_two) for y in (x.codes, x.scale, x.zero))
    if zero is not None and zero.stride() != scale.stride():
        scale, zero = scale.contiguous(), zero.contiguous()
    return codes, scale, zero


def _even(x: Tensor | None, by_two: bool) -> Tensor | None:
    """x (B, H, N, W), or a copy if its pairs begin elsewhere."""
    if x is None or not x.numel() or (x.shape[-1] % 2 and not (by_two and x.shape[-1] == 1)):
        return x
    dense = x.shape[-1] > 1 or x.stride(2) == 1
    apart = [
        step
        for size, step in zip(x.shape[:3], x.stride(), strict=False)
        if size > 1 and step > 1  # neighbouring tokens are the pair
    ]
    begins = x.data_ptr() % (2 * x.element_size()) == 0
    if dense and begins and not any(step % 2 for step in apart):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def worth_reading(
    cache: PackedCache, pattern: Pattern, queries: int, block: int
) -> tuple[int, int]:
    """The first packed key and the first of the newest ones that some query may see; of packed ones
    a multiple of `block`, as tiles must not straddle groups."""
    if isinstance(cache.total, Tensor) or pattern.first > cache.slots:
        return 0, 0
    oldest = cache.total - queries
    low = pattern.span(oldest, cache.total)[0]
    if low is None:
        return 0, 0
    # borders follow each row's start: the worst one
    if isinstance(pattern, Blocks) and cache.start is not None:
        low = oldest - (pattern.look_back + 1) * pattern.size + 1
    rest = cache.k_rest.shape[2]
    first = (
        0
        if cache.packed_numbers is not None
        else min(max(0, low - cache.packed_from), cache.k.tokens)
    )
    newest = 0 if cache.rest_numbers is not None else min(max(0, low - (cache.total - rest)), rest)
    return first // block * block, newest


@lru_cache
def tile(
    k: Coding,
    v: Coding,
    dim: int,
    value_dim: int,
    itemsize: int,
    lines: int,
    shared: int,
    more: int,
) -> dict[str, int]:
    """Tile sizes for `lines` rows and so many bytes of shared memory, as keyword arguments of
    `attend_packed`. A tile of packed keys lies in one group. more: how many there are of q_first,
    keys that turn and a bias, which take registers."""
    width = max(power_of_two(dim), power_of_two(value_dim), 16)
    small = shared < 96 * 1024  # AMD
    if itemsize == 4:  # without matrix units: there to be right
        block_m, longest = 16, 32
    else:
        block_m = min(
            max(16, power_of_two(lines)),
            16 if more or small else 32 if width > 64 else 64,
        )
        longest = min(LONGEST, CODES_AT_ONCE // width) // 2 ** max(more, small or block_m > 16)
    # the largest power of two that divides it
    along = [x.group & -x.group for x in (k, v) if x.axis == "channel"]
    block_n = max(16, min([longest, *along]))
    block_f = max(16, min(longest, 64) // (2 if width > 128 else 1))
    warps = 4
    if itemsize == 2 and block_m == 16 and not (more or small):
        # scales are in every warp's registers: two warps unpack half as many for each key
        warps, block_f = 2, min(block_f, 32)
    stages = 2 if small else 3
    return dict(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_F=block_f, num_warps=warps, num_stages=stages
    )
