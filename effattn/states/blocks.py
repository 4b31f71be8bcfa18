"""What attention to chosen blocks remembers: every token, and a summary of each block of keys.

    state = BlockState(block=16, summarise=backend.summarise)

B: rows; Hkv: key/value heads; N: blocks of `block` tokens, finished in the row that has the most;
D, Dv: of a key, of a value; W: numbers of a summary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout
from effattn.states.full import FullState

Summarise = Callable[[Tensor], Tensor]


class BlockState(FullState):
    """Keys and values as they came, rotated, and `summaries` (B, Hkv, N, W), float32 or better.
    Blocks count from each row's first real token; those that a row has not finished hold nothing of
    meaning."""

    read_by_method = True

    def __init__(self, block: int, summarise: Summarise):
        """summarise: keys (B, Hkv, n * block, D) -> summaries (B, Hkv, n, W)."""
        super().__init__()
        self.block, self.summarise = block, summarise
        self.summaries: Tensor | None = None

    def _bytes(self) -> int:
        return super()._bytes() + (0 if self.summaries is None else self.summaries.nbytes)

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        past = self._seen()
        k, v, layout = super().append(k, v, padding_mask)
        self._finish(past, layout.start)
        return k, v, layout

    @torch.no_grad()
    def _finish(self, past: int, start: Tensor | None) -> None:
        """Summarises the blocks that some row may have finished since `past` tokens."""
        if start is not None:
            # the row that began last has the fewest blocks
            past -= int(start.max()) if self.late is None else self.late
        low, high = max(past, 0) // self.block, self._seen() // self.block
        if self.summaries is not None and low == high:
            return
        at = torch.arange(low * self.block, high * self.block, device=self.k.device)
        if start is None:
            keys = self.k[:, :, low * self.block : high * self.block]
        else:
            at = (start[:, None] + at).clamp(max=self._seen() - 1)[:, None, :, None]
            keys = self.k.gather(2, at.expand(-1, self.k.shape[1], -1, self.k.shape[3]))
        found = self.summarise(keys)
        if self.summaries is not None:
            found = torch.cat([self.summaries[:, :, :low], found], dim=2)
        self.summaries = found

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        if self.summaries is not None:
            self.summaries = self.summaries.index_select(0, index)

    def _repeat(self, n: int) -> None:
        super()._repeat(n)
        if self.summaries is not None:
            self.summaries = self.summaries.repeat_interleave(n, dim=0)

    def _crop(self, n: int) -> None:
        super()._crop(n)
        self.summaries = self.summaries[:, :, : n // self.block].clone()

    def _reset(self) -> None:
        super()._reset()
        self.summaries = None
