"""The static form of a `RecurrentState`, and which state has one.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; F: features of a key."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout, first_real
from effattn.kernels.linear import Memory
from effattn.states.base import State
from effattn.states.blocks import BlockState
from effattn.states.full import ROLLBACK, FullState, RingState
from effattn.states.recurrent import RecurrentState
from effattn.states.sizes import check_fits
from effattn.states.static import Static, StaticRing
from effattn.states.static_blocks import StaticBlocks

NEWEST = 2 * ROLLBACK  # tokens that are not in the sums, at most, in a call of one


class StaticSums(Static):
    """What a `RecurrentState` holds: `memory`, the sums over the first `base` tokens, and k (B,
    Hkv, NEWEST, D), v (B, Hkv, NEWEST, Dv), in which token t lies at t % NEWEST. base: 0-d int64.

    The backend that attends calls `allocate` before it reads the memory, which it folds tokens into
    after a step; after a longer call, for which there is a `growing` form, it calls `settle`."""

    def __init__(self, length: int):
        super().__init__(length)
        self.draw: int | None = None
        self._release()

    def _release(self) -> None:
        self.k = self.v = self.total = self.base = None
        self.memory: Memory | None = None
        self.growing: RecurrentState | None = None

    def tensors(self) -> Iterator[Tensor]:
        held = (self.k, self.v, *(self.memory or ()))
        yield from (x for x in held if x is not None)

    def everything(self) -> Iterator[Tensor]:
        yield from super().everything()
        if self.base is not None:
            yield self.base

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        self.check_room(k, v)
        if self.k is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], NEWEST, x.shape[3]) for x in (k, v))
            self.total, self.base = (k.new_zeros((), dtype=torch.int64) for _ in "tb")
            self.stay()
        check_fits(self.k, self.v, k, v)
        if k.shape[2] > 1:
            self.growing = self._growing()
            return self.growing.append(k, v, padding_mask)
        self.growing = None
        past = self.total.clone()
        for held, x in ((self.k, k), (self.v, v)):
            held.index_copy_(2, (past % NEWEST)[None], x)
        self.total.add_(1)
        number = past - (past - torch.arange(NEWEST, device=k.device)) % NEWEST
        number = torch.where(number >= self.base, number, -1)
        start, real = None, (number >= 0)[None]
        if padding_mask is not None:
            start, last = first_real(padding_mask), padding_mask.shape[1] - 1
            real = real & padding_mask.index_select(1, number.clamp(0, last))
        return self.k, self.v, Layout(0, 0, start, real, None, number, past + 1)

    @property
    def due(self) -> Tensor:
        """Whether the oldest `ROLLBACK` tokens belong into the sums by now, bool 0-d."""
        return self.total - self.base >= NEWEST

    def allocate(self, features: int, normalize: bool, weighs: bool, dtype: torch.dtype) -> Memory:
        """The memory, which is made where there is none yet. dtype: of the sums."""
        if self.memory is None:
            batch, heads, _, value_dim = self.v.shape
            zeros = self.v.new_zeros(batch, heads, features, value_dim + 1, dtype=dtype)
            self.memory = Memory(
                zeros[..., :-1].clone(),
                zeros[..., -1].clone() if normalize else None,
                zeros.new_full((batch, heads), -torch.inf) if weighs else None,
            )
            self.stay()
        return self.memory

    def _growing(self) -> RecurrentState:
        """The growing form, of what is held now."""
        growing, total, base = RecurrentState(), int(self.total), int(self.base)
        growing.draw = self.draw
        if not total:
            return growing
        order = torch.arange(base, total, device=self.k.device) % NEWEST
        growing.k, growing.v = (x.index_select(2, order) for x in (self.k, self.v))
        growing.base = base
        if base:
            growing.sums, growing.norms, growing.top = self.memory
        return growing

    def settle(self) -> None:
        """Holds what the growing form does."""
        growing, self.growing = self.growing, None
        total = growing._seen()
        order = torch.arange(growing.base, total, device=self.k.device) % NEWEST
        for held, x in ((self.k, growing.k), (self.v, growing.v)):
            held.index_copy_(2, order, x)
        if growing.base:
            for held, x in zip(self.memory, growing.memory, strict=True):
                if held is not None:
                    held.copy_(x)
        self.total.fill_(total)
        self.base.fill_(growing.base)

    def _check_crop(self, n: int) -> None:
        self._growing()._check_crop(n)

    def _crop(self, n: int) -> None:
        self.total.fill_(n)

    def _reset(self) -> None:
        super()._reset()
        self.growing = self.draw = None
        if self.base is not None:
            self.base.zero_()
        if self.memory is not None:
            self.memory.sums.zero_()
            if self.memory.norms is not None:
                self.memory.norms.zero_()
            if self.memory.top is not None:
                self.memory.top.fill_(-torch.inf)

    def _rows(self, how) -> None:
        base, self.base = self.base, None
        memory, self.memory = self.memory, None
        super()._rows(how)
        if memory is not None:
            self.memory = Memory(*(None if x is None else how(x) for x in memory))
        self.base = None if base is None else base.clone()
        self.stay()


def static_form(own: State, length: int) -> Static | None:
    """An empty state with room for `length` tokens that holds what `own` would, a backend's own;
    None where there is no such form."""
    if type(own) in (FullState, RingState):
        return StaticRing(own, length)
    if type(own) is BlockState:
        return StaticBlocks(own, length)
    return StaticSums(length) if type(own) is RecurrentState else None
