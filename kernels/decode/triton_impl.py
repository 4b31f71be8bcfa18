"""Softmax attention of a few new tokens over a cache, in Triton: what to read, how to split it, two
launches.

    out, lse = attention(q, k, v, Window(back=512), Layout(), causal=True, scale=0.125,
                         softcap=None, q_first=None, counts=None, need_lse=True)

Lengths stay integers of the host, and masks are made inside of the kernel from what the layout
holds: a step launches nothing but the kernels and waits for nothing."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..flash.pattern import Blocks, Layout, Pattern, Window
from ..flash.rules import Bias
from ..flash.triton_bias import BIASES, arguments
from ..launching import Constants, constants, launch
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from .triton_kernels import attend, combine
from .triton_pieces import in_blocks, in_window
from .triton_turned import attend_turned
from .turn import Turn

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256  # head dimension
FARTHEST = 2**30  # "no bound" among the kernel's int32 positions
# of K, and of V: at three stages, two programs fit in an A100's processor and three in an H200's
TILE_BYTES = 2**14
RESIDENT = 2  # programs that run at once on a processor
OVERHEAD = 2  # of one program and of `combine`: about as long as reading this many tiles


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    counts: Tensor | None,
    need_lse: bool,
    turn: Turn | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `effattn.kernels.decode.attention`. Any strides but the last one's are free: a part of a
    cache is not copied.

    Keys that nobody sees must hold finite numbers, as for the other implementations.
    """
    _check(q, k, v)
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    group = heads // kv_heads
    lines = group * queries
    q_first = q_first if pattern.first else None
    numbers, head, low, counts = _visited(pattern, layout, q, keys, counts)
    more = counts is not None or q_first is not None or turn is not None or bias is not None
    if counts is not None and q_first is None and turn is None and bias is None:
        layout = Layout()  # nothing else asks where the keys are

    fixed = _constants(
        *(dim, value_dim, q.element_size(), lines, shared_memory(q.device), more),
        *(turn is not None, None if counts is not None else type(pattern)),
        *(causal, head > 0, softcap is not None, bias and bias.kind),
    )
    block = fixed["BLOCK_N"]
    tiles, row_tiles = cdiv(head, block) + cdiv(keys - low, block), cdiv(lines, fixed["BLOCK_M"])
    splits = split(tiles, batch * kv_heads * row_tiles, processors(q.device))
    grid = (splits * row_tiles, kv_heads, batch)
    out, lse, parts, sums = results(q, value_dim, splits, need_lse)

    params, step, n_params = arguments(bias)
    held = layout.start, layout.mask, layout.slots_at, layout.ring
    start, mask, slots_at, ring = [x if x is None else dense_rows(x) for x in held]
    mask_b = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    ends = (
        *(mask_b, *((0, 0, 0, 0) if counts is None else counts.stride())),
        *(group, row_tiles, *in_base_two(scale, softcap), step, n_params),
    )
    numbers = (
        *(queries, layout.tail, layout.tokens(keys), layout.slots, min(pattern.first, FARTHEST)),
        *(*numbers, head, low, keys, tiles, cdiv(tiles, splits)),
    )
    held = start, mask, slots_at, ring, counts, params
    ours = *strides(q_first), *strides(k), *strides(v)
    with torch.cuda.device_of(q):
        if turn is None:
            tensors = q, q_first, k, v, parts, sums, *held
            launch(attend, grid, (*tensors, *strides(q), *ours, *ends, *numbers), fixed)
        else:
            q_far, inv_freq = dense_rows(turn.q_far), turn.inv_freq.to(q.device, torch.float32)
            classes = tile_classes(turn, layout, queries, keys, head, low, block, tiles)
            tensors = q, q_far, q_first, k, v, parts, sums, inv_freq, *held
            lies = *strides(q), *strides(q_far), *ours, *ends, float(turn.scaling)
            given = (*tensors, *lies, *classes, *numbers)
            launch(attend_turned, grid, given, turned(turn, fixed))
        if splits > 1:
            merge(parts, sums, out, lse)
    return out, lse


@lru_cache
def _constants(
    dim: int,
    value_dim: int,
    itemsize: int,
    lines: int,
    shared: int,
    more: bool,
    turns: bool,
    pattern: type | None,
    causal: bool,
    head: bool,
    softcap: bool,
    bias: str | None,
) -> Constants:
    """What `attend` is compiled for. `pattern`: the class, None where counts say who sees whom; the
    others as in `tile` and in the kernel."""
    return constants(
        D=dim,
        DV=value_dim,
        NEAR=None if pattern is None else twin(pattern),
        CAUSAL=causal,
        HEAD=head,
        SOFTCAP=softcap,
        BIAS=BIASES[bias],
        **tile(dim, value_dim, itemsize, lines, shared, more, turns),
    )


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError for what the kernel cannot do and plain torch can."""
    dim, value_dim = q.shape[3], v.shape[3]
    if q.dtype not in DTYPES or max(dim, value_dim) > WIDEST:
        raise ValueError(
            f"decode: got {q.dtype} with head dimensions {dim} and {value_dim}; the Triton kernel "
            f"takes float16, bfloat16 and float32 with at most {WIDEST}, impl='torch' takes all"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "decode: the Triton kernel has no gradients; valid are torch.no_grad() and impl='torch'"
        )


def _visited(
    pattern: Pattern, layout: Layout, q: Tensor, keys: int, counts: Tensor | None
) -> tuple:
    """(three numbers of the predicate, `head` and `low` as `worth_reading` says, counts as the
    kernel takes them): counts say themselves who sees whom, so that all keys are read."""
    if counts is None:
        numbers = predicate(pattern)[1:]
        return numbers, *worth_reading(pattern, layout, q.shape[2], keys), None
    counts = counts.view(torch.uint8) if counts.dtype == torch.bool else counts
    return (0, 0, 0), 0, 0, counts.expand(*q.shape[:3], keys)


def results(
    q: Tensor, value_dim: int, splits: int, need_lse: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """out, lse, and where a split writes its own of both: there, or in fp32 beside the others'."""
    alike = value_dim == q.shape[3] and q.is_contiguous()  # half as long to make
    out = torch.empty_like(q) if alike else q.new_empty(*q.shape[:3], value_dim)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if need_lse else None
    if splits == 1:
        return out, lse, out, lse
    parts = q.new_empty(splits, *out.shape, dtype=torch.float32)
    return out, lse, parts, q.new_empty(splits, *q.shape[:3], dtype=torch.float32)


def in_base_two(scale: float, softcap: float | None) -> tuple[float, float]:
    """(inner, outer): what q is multiplied by, and what tanh's result is, so that exp2 of a score
    is the softmax's exp."""
    if softcap is None:
        return scale / math.log(2), 1.0
    return scale / softcap, softcap / math.log(2)


def merge(parts: Tensor, sums: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """out and lse of all splits together."""
    splits, value_dim = parts.shape[0], out.shape[3]
    lines = sums.numel() // splits
    given = (parts, sums, out, lse, splits, lines)
    launch(combine, (lines, 1, 1), given, combine_tile(value_dim))


def tile_classes(
    turn: Turn, layout: Layout, queries: int, keys: int, head: int, low: int, block: int, tiles: int
) -> tuple[int, float, int, int, int]:
    """window, slow, and how many tiles are of each class, as `attend_turned` takes them.

    A query's distance to a key after the slots does not depend on where its row begins; to the
    others it does."""
    slow = 1.0 if math.isinf(turn.slow) else float(turn.slow)
    if turn.window is None:
        return 0, slow, 0, 0, 0
    if layout.ring is not None:
        return turn.window, slow, tiles, 0, 0
    in_front = cdiv(head, block)
    ahead = in_front if head else min(cdiv(layout.slots, block), tiles)
    first = layout.tail + low - layout.slots  # token number of the first key behind the front
    total = layout.tokens(keys)
    distant = in_front + (total - queries - turn.window - first + 1) // block - ahead
    distant = max(0, min(distant, tiles - ahead))
    close = in_front + cdiv(total - turn.window - first, block)
    return turn.window, slow, ahead, distant, max(0, min(close, tiles) - ahead - distant)


def turned(turn: Turn, fixed: dict) -> dict:
    """The compile-time arguments of `attend_turned`, from those of `attend`."""
    slowed = turn.window is not None and not math.isinf(turn.slow)
    return _turned(Constants.of(fixed), len(turn.inv_freq), turn.interleaved, slowed)


@lru_cache
def _turned(fixed: Constants, half: int, interleaved: bool, slowed: bool) -> Constants:
    rest = fixed["D"] - 2 * half
    sizes = dict(BLOCK_R=max(16, power_of_two(half)), BLOCK_P=max(16, power_of_two(rest)))
    more = dict(R2=half, INTERLEAVED=interleaved, SLOWED=slowed, **sizes)
    return constants(**{name: x for name, x in fixed.items() if name != "BLOCK_D"}, **more)


def twin(pattern: type[Pattern]):
    """The jitted twin of a pattern's `near`; None: all is near."""
    if pattern is Pattern:
        return None
    if issubclass(pattern, Window):
        return in_window
    if issubclass(pattern, Blocks):
        return in_blocks
    raise ValueError(
        f"decode: got a {pattern.__name__} without `counts`, which has no predicate in the kernel"
    )


def predicate(pattern: Pattern) -> tuple:
    """`twin`, and its three numbers."""
    near = twin(type(pattern))
    if near is None:
        return near, 0, 0, 0
    if near is in_window:
        return near, min(pattern.back, FARTHEST), min(pattern.ahead, FARTHEST), 0
    size = min(pattern.size, FARTHEST)
    return near, size, min(pattern.look_back, FARTHEST // size), pattern.shifted * (size // 2)


def worth_reading(pattern: Pattern, layout: Layout, queries: int, keys: int) -> tuple[int, int]:
    """(head, low): at most `head` keys from the front (slots and first ones), and all keys from
    index `low` on.

    Queries are the last tokens, so there is never a bound above. Rings are in no order and are read
    whole."""
    low_query = layout.tokens(keys) - queries
    low = pattern.span(low_query, low_query + queries)[0]
    if low is None or layout.ring is not None:
        return 0, 0
    first = pattern.first
    if layout.start is None:
        first = max(0, first - layout.tail)
    elif isinstance(pattern, Blocks):
        # borders follow each row's start, which the host does not know: the worst one
        low = low_query - (pattern.look_back + 1) * pattern.size + 1
    head = min(layout.slots + first, keys)
    low = min(low - layout.tail + layout.slots, keys)
    return (0, 0) if low <= head else (head, low)


@lru_cache
def tile(
    dim: int,
    value_dim: int,
    itemsize: int,
    lines: int,
    shared: int,
    more: bool,
    turns: bool = False,
) -> dict[str, int]:
    """Tile sizes for `lines` rows (queries times heads of a group), as keyword arguments of
    `attend`.

    more: there are counts, q_first, a bias or raw keys, which take registers. turns: it is raw
    keys, which with wide heads take more than Hopper and Blackwell give: smaller tiles, and fewer
    in flight."""
    block_d, block_dv = (max(16, power_of_two(x)) for x in (dim, value_dim))
    width = max(block_d, block_dv)
    small = shared < 6 * TILE_BYTES  # AMD, and NVIDIA before Ampere
    if itemsize == 4:  # without matrix units: there to be right, and small enough for the registers
        block_m, block_n = 16, 32 if width <= 64 else 16
    else:
        block_m = min(max(16, power_of_two(lines)), 64 if width <= 128 and not more else 32)
        block_n = min(128 if block_m == 16 else 64, TILE_BYTES // (width * itemsize)) // (
            2 if small or more else 1
        )
        block_n = max(16, block_n // 2) if turns and width > 64 else block_n
    stages = 2 if small or (turns and width > 64) else 3
    return dict(
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=stages,
    )


@lru_cache
def combine_tile(value_dim: int) -> dict[str, int]:
    """The same for `combine`: as many splits at once as a tile of 4096 numbers holds."""
    block_dv = max(16, power_of_two(value_dim))
    return constants(DV=value_dim, BLOCK_DV=block_dv, CHUNK=4096 // max(32, block_dv), num_warps=4)


@lru_cache(maxsize=4096)
def split(tiles: int, programs: int, processors: int) -> int:
    """Into how many parts to split `tiles` so that `programs` times as many programs end soonest;
    none is empty.

    A wave of programs takes as long as one of them: its tiles and its overhead. Ties go to the
    fewer parts."""
    capacity = RESIDENT * processors

    def time(parts: int) -> int:
        waves = -(-parts * programs // capacity)
        return waves * (-(-tiles // parts) + OVERHEAD) + OVERHEAD * (parts > 1)

    parts = min(range(1, min(tiles, capacity) + 1), key=time, default=1)
    return -(-tiles // -(-tiles // parts)) if tiles else 1


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 in the interpreter."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 8
    )


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 227 * 1024
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", None) or found.shared_memory_per_block


def strides(x: Tensor | None) -> tuple[int, ...]:
    """The outer strides of (B, H, T, D), in elements."""
    return (0, 0, 0) if x is None else x.stride()[:3]
