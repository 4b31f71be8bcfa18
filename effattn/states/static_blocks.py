"""The static form of a `BlockState`: every token in its place, and room for a summary a block.

B: rows; Hkv: key/value heads; D: of a key; N: blocks that there is room for; W: numbers of a
summary."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout
from effattn.states.blocks import BlockState
from effattn.states.full import FullState
from effattn.states.static import StaticRing


class StaticBlocks(StaticRing):
    """What a `BlockState` holds, `own`: k and v as in `StaticRing`, token t at place t, and
    `summaries` (B, Hkv, N, W), of which those of blocks that a row has not finished hold nothing of
    meaning."""

    read_by_method = True

    def __init__(self, own: BlockState, length: int):
        super().__init__(own, length)
        self.block, self.summarise = own.block, own.summarise
        self.new = partial(BlockState, own.block, own.summarise)
        self.summaries: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        if self.summaries is not None:
            yield self.summaries

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        one = self.summarise(k.new_zeros(*k.shape[:2], self.block, k.shape[3]))
        self.summaries = one.new_zeros(*k.shape[:2], self.length // self.block, one.shape[3])
        super()._allocate(k, v)

    def _step(self, k, v, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Layout]:
        found = super()._step(k, v, padding_mask)
        self._finish(found[2].start)
        return found

    @torch.no_grad()
    def _finish(self, start: Tensor | None) -> None:
        """Summarises each row's last finished block, whether or not it is finished just now: so
        nobody asks for a number."""
        if not self.summaries.shape[2]:
            return
        began = torch.zeros_like(self.total)[None] if start is None else start
        last = (self.total - began).div(self.block, rounding_mode="floor") - 1  # (1 or B,)
        number = (began + last * self.block)[:, None] + torch.arange(self.block, device=last.device)
        number = number.clamp(0, self.length - 1)[:, None, :, None]
        keys = self.k.gather(2, number.expand(*self.k.shape[:2], -1, self.k.shape[3]))
        place = last.clamp(min=0)[:, None, None, None]
        place = place.expand(*self.k.shape[:2], 1, self.summaries.shape[3])
        before = self.summaries.gather(2, place)
        there = (last >= 0)[:, None, None, None]
        self.summaries.scatter_(2, place, torch.where(there, self.summarise(keys), before))

    def _growing(self) -> FullState:
        growing = super()._growing()
        if growing.k is not None:
            count = growing.k.shape[2] // self.block
            growing.summaries = self.summaries[:, :, :count]
        return growing

    def _take(self, growing: FullState) -> None:
        super()._take(growing)
        found = growing.summaries
        self.summaries[:, :, : found.shape[2]] = found

    def _release(self) -> None:
        super()._release()
        self.summaries = None
