"""Who sees whom, and where the keys lie: what the flash and decode kernels need to know about an
exact pattern.

A pattern speaks of positions: tokens since the row's first real one, so that left padding changes
nothing. `sees` is the predicate (its jitted twin is in `triton_impl`), `span` the keys worth
visiting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Every query sees every key. `first`: keys at positions below it are seen by all (sinks),
    whatever `near` says.
    """

    first: int = 0

    def near(self, i: Tensor, j: Tensor, h: Tensor, heads: int) -> Tensor | None:
        """Whether the query at position i of head h (of `heads`) sees the key at j, broadcast;
        None: always.
        """
        return None

    def span(self, low: int, high: int) -> tuple[int | None, int | None]:
        """[first, last) position of the keys that any query at positions [low, high) sees by
        `near`; None: no bound. It may lie outside of the sequence, and ignores causality."""
        return None, None

    def sees(self, i: Tensor, j: Tensor, h: Tensor, heads: int, causal: bool) -> Tensor:
        """bool, the broadcast shape of i, j and h. Negative positions are not real: they see and
        show nothing.
        """
        visible = (j >= 0) & (i >= 0)
        if causal:
            visible = visible & (j <= i)
        near = self.near(i, j, h, heads)
        return (
            visible if near is None else visible & (near | (j < self.first) if self.first else near)
        )


@dataclass(frozen=True)
class Window(Pattern):
    """i - j < back and j - i < ahead: `back` keys up to the query's own, and `ahead` from it on
    (bidirectional).
    """

    back: int = 1
    ahead: int = 1

    def near(self, i, j, h, heads):
        return (i - j < self.back) & (j - i < self.ahead)

    def span(self, low, high):
        return low - self.back + 1, high - 1 + self.ahead


@dataclass(frozen=True)
class Blocks(Pattern):
    """The query's block of `size` tokens and the `look_back` blocks before it. `shifted`: the
    second half of the heads has its borders half a block earlier (LongLoRA), nothing wraps
    round."""

    size: int = 1
    look_back: int = 0
    shifted: bool = False

    def shift(self, h: Tensor | int, heads: int) -> Tensor | int:
        """Tokens that the borders of head h lie before those of an unshifted head."""
        return (h >= heads // 2) * (self.size // 2) if self.shifted else 0

    def near(self, i, j, h, heads):
        shift = self.shift(h, heads)
        behind = (i + shift) // self.size - (j + shift) // self.size
        return (behind >= 0) & (behind <= self.look_back)

    def span(self, low, high):
        half = self.size // 2 if self.shifted else 0
        lows = [(low + s) // self.size * self.size - s for s in {0, half}]
        highs = [-(-(high + s) // self.size) * self.size - s for s in {0, half}]
        return min(lows) - self.look_back * self.size, max(highs)


@dataclass(frozen=True)
class Layout:
    """Where the given keys lie in their sequences. The queries are always the last tokens.

    The first `slots` keys are the tokens at positions 0 .. slots - 1 of each row (sinks that
    outlived their ring), or at positions `slots_at` (slots,) int64; the others are contiguous: key
    slots + c is token number tail + c, padding counted. So there are tail + Tk - slots tokens.
    `start` (B,) int64: the number of each row's first real token (None: 0); `mask` (B, Tk) bool:
    which of the given keys are real and not given twice (None: all). `ring` (Tk - slots,) int64:
    instead of that order, the number of each key after the slots (-1: empty), and `total` tokens in
    all, an int or a 0-d int64 tensor, as `tail` may be. Rings and `slots_at` are for the decode
    kernels only."""

    slots: int = 0
    tail: int | Tensor = 0
    start: Tensor | None = None
    mask: Tensor | None = None
    slots_at: Tensor | None = None
    ring: Tensor | None = None
    total: int | Tensor | None = None

    def tokens(self, keys: int) -> int | Tensor:
        """How many tokens there are so far, held or not."""
        return self.tail + keys - self.slots if self.total is None else self.total

    def key_positions(self, keys: int, device) -> Tensor:
        """int64 (1 or B, Tk); -1 for keys that are not to be seen."""
        if self.ring is None:
            begin, count = self.tail, keys - self.slots
            if isinstance(begin, Tensor):
                position = (begin + torch.arange(count, device=device))[None]
            else:
                position = torch.arange(begin, begin + count, device=device)[None]
        else:
            position = self.ring[None]
        if self.start is not None:
            position = torch.where(position >= 0, position - self.start[:, None], -1).clamp(min=-1)
        if self.slots:
            first = (
                torch.arange(self.slots, device=device) if self.slots_at is None else self.slots_at
            )
            position = torch.cat([first[None].expand(position.shape[0], -1), position], dim=1)
        return position if self.mask is None else torch.where(self.mask, position, -1)

    def query_positions(self, queries: int, keys: int, device) -> Tensor:
        """int64 (1 or B, Tq); negative for padding on the left."""
        total = self.tokens(keys)
        if isinstance(total, Tensor):  # of a static state: a number that nobody asks for
            number = (total - queries + torch.arange(queries, device=device))[None]
        else:
            number = torch.arange(total - queries, total, device=device)[None]
        return number if self.start is None else number - self.start[:, None]


IN_ORDER = Layout()  # all tokens, one after the other, and no padding


def layout_of(padding_mask: Tensor | None) -> Layout:
    """The layout of keys that are all there, with the padding mask (B, Tk) bool that came with
    them.
    """
    if padding_mask is None:
        return IN_ORDER
    return Layout(start=first_real(padding_mask), mask=padding_mask)


def first_real(padding_mask: Tensor) -> Tensor:
    """(B, T) bool -> (B,) int64: the number of each row's first real token; T where there is
    none.
    """
    keys = padding_mask.shape[1]
    return torch.where(padding_mask.any(dim=1), padding_mask.int().argmax(dim=1), keys)
