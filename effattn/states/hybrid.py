"""What a window and linear attention under one denominator remember: the window's tokens as they
came, the sinks, and sums over what has left the window.

B: rows; Hkv: key/value heads; T: new tokens; R: tokens that are not in the sums; D, Dv: of a key,
of a value."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout, first_real
from effattn.kernels.linear import Memory
from effattn.states.recurrent import RecurrentState, folded


class HybridState(RecurrentState):
    """A `RecurrentState` whose newest `window` tokens and 16 to 31 more stay outside of the sums,
    and that keeps each row's first `sinks` real tokens: first_k (B, Hkv, sinks, D) and first_v (B,
    Hkv, sinks, Dv), once there are sums."""

    def __init__(self, window: int, sinks: int):
        self.window, self.sinks = window, sinks
        super().__init__()

    def _reset(self) -> None:
        super()._reset()
        self.first_k: Tensor | None = None
        self.first_v: Tensor | None = None

    @property
    def due(self) -> int:
        return max(0, folded(self._seen() - self.window) - self.base)

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Returns the sinks that are in no window, and the tokens that are not in the sums."""
        k, v, layout = super().append(k, v, padding_mask)
        if self.first_k is None or not self.sinks:
            return k, v, layout
        number = self._numbers(layout.start, k.device)
        # a sink that is among the other tokens too is given once
        there = (number < self.base).expand(k.shape[0], -1)
        real = layout.mask
        if real is None:
            real = there.new_ones(k.shape[0], k.shape[2])
        k, v = torch.cat([self.first_k, k], dim=2), torch.cat([self.first_v, v], dim=2)
        mask = torch.cat([there, real], dim=1)
        return k, v, Layout(self.sinks, self.base, layout.start, mask)

    def _numbers(self, start: Tensor | None, device) -> Tensor:
        """(B or 1, sinks): the number of the token that each row has as each of its sinks."""
        at = torch.arange(self.sinks, device=device)[None]
        return at if start is None else start[:, None] + at

    def leave(self, tokens: int, memory: Memory, padding_mask: Tensor | None) -> None:
        """`fold`, and the sinks among the first `tokens` stay; padding_mask (B, seq_len) bool."""
        if self.sinks:
            start = None if padding_mask is None else first_real(padding_mask)
            place = self._numbers(start, self.k.device) - self.base
            inside = ((place >= 0) & (place < tokens))[:, None, :, None]
            at = place.clamp(0, tokens - 1)[:, None, :, None]
            kept = []
            for held, x in ((self.first_k, self.k), (self.first_v, self.v)):
                found = x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))
                old = torch.zeros_like(found) if held is None else held
                kept.append(torch.where(inside, found, old))
            self.first_k, self.first_v = kept
        self.fold(tokens, memory)

    def _check_crop(self, n: int) -> None:
        # the sums are read beside far keys that are outside of them: the token that comes next has
        # to have left token n - window behind
        least = self.base + self.window
        if self.base and n < least:
            raise ValueError(
                f"crop: got {n}, but the first {self.base} tokens are in the sums, which cannot "
                f"give a window back; valid are 0 and {least} to {self.seq_len}"
            )

    def _tensors(self) -> dict[str, Tensor]:
        kept = {"first_k": self.first_k, "first_v": self.first_v}
        return super()._tensors() | {name: x for name, x in kept.items() if x is not None}
