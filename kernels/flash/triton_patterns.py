"""The tables of patterns and of score rules, as the flash kernels ask them.

A new pattern is two jitted functions of positions below and a line in PATTERNS; a new score rule,
two and a line in RULES; a new bias, one and a line in `triton_bias`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pattern import Blocks, Pattern, Window
from .triton_pieces import FAR, LOG2E

# ---- patterns: [low, high) of the positions that the token at x sees, and of those that see it.
# Neither bound may fall as x grows. x is a scalar, or a tensor of any shape; h the query head, of
# `heads`; a, b, c are the pattern's integers.


@triton.jit
def full_keys(x, h, heads, a, b, c):
    """Keys that the query at x sees: all."""
    return x * 0, x * 0 + FAR


@triton.jit
def full_queries(x, h, heads, a, b, c):
    """Queries that see the key at x: all."""
    return x * 0, x * 0 + FAR


@triton.jit
def window_keys(x, h, heads, back, ahead, c):
    """Keys that the query at x sees: `back` with its own, and `ahead` - 1 behind."""
    return x - back + 1, x + ahead


@triton.jit
def window_queries(x, h, heads, back, ahead, c):
    """Queries that see the key at x."""
    return x - ahead + 1, x + back


@triton.jit
def blocks_keys(x, h, heads, size, look_back, shift):
    """Its own block and `look_back` before; half the heads have shifted borders."""
    shift = tl.where(h >= heads // 2, shift, 0)
    low = (x + shift) // size * size - shift
    return low - look_back * size, low + size


@triton.jit
def blocks_queries(x, h, heads, size, look_back, shift):
    """Queries that see the key at x."""
    shift = tl.where(h >= heads // 2, shift, 0)
    low = (x + shift) // size * size - shift
    return low, low + (look_back + 1) * size


class Jitted(NamedTuple):
    """A pattern for the kernels. `near`(i, j, h, heads, a, b, c), if there is one, punches holes
    into the intervals.
    """

    keys: Any
    queries: Any
    integers: Callable[[Any], tuple[int, int, int]]
    near: Any = None


def _blocks(pattern: Blocks) -> tuple[int, int, int]:
    size = min(pattern.size, FAR.value)
    return size, min(pattern.look_back, FAR.value // size), size // 2 if pattern.shifted else 0


PATTERNS: dict[type[Pattern], Jitted] = {
    Pattern: Jitted(full_keys, full_queries, lambda p: (0, 0, 0)),
    Window: Jitted(
        window_keys, window_queries, lambda p: (min(p.back, FAR.value), min(p.ahead, FAR.value), 0)
    ),
    Blocks: Jitted(blocks_keys, blocks_queries, _blocks),
}

# ---- score rules: the score to use for a scaled product s, and its derivative by s, told from that
# score.


@triton.jit
def softcap_score(s, i, j, h, cap):
    """cap tanh(s / cap), safe at both ends."""
    return cap - 2 * cap / (tl.exp2(s * (2 * LOG2E / cap)) + 1)


@triton.jit
def softcap_slope(score, i, j, h, cap):
    """Its derivative, from the score."""
    return 1 - (score / cap) * (score / cap)


RULES: dict[str | None, tuple[Any, Any]] = {
    None: (None, None),
    "softcap": (softcap_score, softcap_slope),
}
