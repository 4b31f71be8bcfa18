"""Which slots a query sees: those of the blocks that ended before its own began."""

from __future__ import annotations

from dataclasses import dataclass

from ..flash.pattern import Pattern


@dataclass(frozen=True)
class Earlier(Pattern):
    """Keys are slots, `slots` for each block of `size` tokens; the first one is at position
    `offset`.

    A query at position i sees the slots of the i // size blocks before its own. Not to be combined
    with causality, since a slot's position says nothing about time."""

    size: int = 1
    slots: int = 1
    offset: int = 0

    def near(self, i, j, h, heads):
        return j < self.offset + i // self.size * self.slots

    def span(self, low, high):
        return self.offset, self.offset + (high - 1) // self.size * self.slots
