"""States whose tensors never change their shapes, nor where they lie: a decoding step is one graph,
for `torch.compile(fullgraph=True)` and for CUDA graphs.

    state = static_form(attn.new_state(), 4096)       # None where there is no such form
    y = attn(q, k, v, state=state)                    # a prompt, as it is
    step = torch.compile(attn, fullgraph=True)        # then one token at a time

All room is allocated at the first call, and lengths are tensors. One new token is written where it
belongs, and what is not there yet is masked. For anything else (a prompt, `crop`) the growing form
is made of what is held and asked, and what it holds afterwards is written back: so both forms give
and refuse the same.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; S: slots; W: places of
the ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.kernels.flash.pattern import Layout, first_real
from effattn.states.base import State
from effattn.states.full import FullState, RingState
from effattn.states.sizes import check_fits


class Static(State):
    """Base of the static forms. length: room for so many tokens. total: tokens so far, 0-d int64;
    it and `tensors()` are written in place, so that a compiled step knows them by their address."""

    static = True

    def __init__(self, length: int):
        self.length = length
        self.total: Tensor | None = None

    def _seen(self) -> int | Tensor:
        """Tokens so far, a 0-d int64 tensor as in transformers' StaticLayer; 0 before the first."""
        return 0 if self.total is None else self.total

    def _release(self) -> None:
        """Forgets all tokens, and where they lay."""
        raise NotImplementedError

    def everything(self) -> Iterator[Tensor]:
        yield from super().everything()
        if self.total is not None:
            yield self.total

    def check_room(self, k: Tensor, v: Tensor) -> None:
        """Unsupported for gradients, ValueError for more tokens than there is room for, where that
        can be known."""
        if self.learning or (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
            raise Unsupported("cache: a static one has no gradients; valid is torch.no_grad()")
        if torch.compiler.is_compiling():
            return
        past = int(self.seq_len)
        if past + k.shape[2] > self.length:
            raise ValueError(
                f"cache: got {past} + {k.shape[2]} tokens, valid are at most "
                f"max_length={self.length}"
            )

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        super()._change(how)
        self.stay()

    def stay(self) -> None:
        """Tells compiled steps that the tensors stay where they are."""
        if not torch.compiler.is_compiling():
            for x in self.everything():
                torch._dynamo.mark_static_address(x)

    def _reset(self) -> None:
        if self.total is not None:
            self._thaw()
            self.total.zero_()

    def _reorder(self, index: Tensor) -> None:
        for x in self.tensors():
            x.copy_(x.index_select(0, index.to(x.device)))

    def _select(self, index: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, index.to(x.device)))

    def _repeat(self, n: int) -> None:
        self._rows(lambda x: x.repeat_interleave(n, dim=0))

    def _rows(self, how: Callable[[Tensor], Tensor]) -> None:
        """Changes the rows of what is held; `total` belongs to none, and is this copy's own."""
        total, self.total = self.total, None
        self._change(how)
        self.total = None if total is None else total.clone()
        self.stay()


class StaticRing(Static):
    """What a `RingState` or a `FullState` holds, `own`: k (B, Hkv, S + W + 1, D) and v alike:
    slots, then token t at S + t % W, then a place for what goes nowhere. W is `length` where
    everything is kept. `least`: the oldest token in the ring, 0-d int64, as `RingState.oldest`."""

    read_by_method = False

    def __init__(self, own: FullState, length: int):
        super().__init__(length)
        self.evicts, self.keep = own.evicts, getattr(own, "keep", None)
        self.ring = min(own.ring, length) if isinstance(own, RingState) else length
        positions = own.slot_positions(length) if isinstance(own, RingState) else ()
        positions = list(positions) if self.ring < length else []
        self.slots, self.in_turn = len(positions), positions == list(range(len(positions)))
        self.new = (
            FullState if self.keep is None else partial(RingState, own.keep, own.slot_positions)
        )
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.least: Tensor | None = None
        self._places = torch.tensor(positions, dtype=torch.int64)

    def tensors(self) -> Iterator[Tensor]:
        if self.k is not None:
            yield from (self.k, self.v)

    def everything(self) -> Iterator[Tensor]:
        yield from super().everything()
        if self.least is not None:
            yield self.least

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        self.check_room(k, v)
        if self.k is None:
            self._allocate(k, v)
        check_fits(self.k, self.v, k, v)
        if k.shape[2] == 1:
            return self._step(k, v, padding_mask)
        growing = self._growing()
        found = growing.append(k, v, padding_mask)
        self._take(growing)
        return found

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        places = self.slots + self.ring + 1
        self.k, self.v = (x.new_zeros(*x.shape[:2], places, x.shape[3]) for x in (k, v))
        self.total, self.least = (k.new_zeros((), dtype=torch.int64) for _ in "tl")
        self._places = self._places.to(k.device, non_blocking=True)
        self.stay()

    def _step(self, k, v, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Layout]:
        """One token, in the place of the oldest one: nothing here asks for a number."""
        start = None if padding_mask is None else first_real(padding_mask)
        past, total = self.total.clone(), self.total + 1
        if self.slots:
            self._outlive(past - self.ring, start)
        at = (self.slots + past % self.ring)[None]
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        self.total.add_(1)
        self.least.copy_(torch.maximum(self.least, total - self.ring))
        places = torch.arange(self.ring + 1, device=k.device)
        number = past - (past - places) % self.ring
        there = (number >= self.least) & (places < self.ring)
        number = torch.where(there, number, -1)
        real = there[None]
        if padding_mask is not None:
            last = padding_mask.shape[1] - 1
            real = real & padding_mask.index_select(1, number.clamp(0, last))
        if self.slots:
            origin = 0 if start is None else start[:, None]
            held = origin + self._places < self.least
            real = torch.cat([held.expand(len(real), -1), real], dim=1)
        places = None if self.in_turn else self._places
        return self.k, self.v, Layout(self.slots, 0, start, real, places, number, total)

    def _outlive(self, leaves: Tensor, start: Tensor | None) -> None:
        """Copies the token number `leaves`, which is about to be overwritten, to its slot."""
        origin = leaves[None] if start is None else leaves - start  # (1 or B,): its position
        slot = torch.searchsorted(self._places, origin).clamp(max=self.slots - 1)
        wanted = (self._places[slot] == origin) & (leaves >= self.least)
        slot = torch.where(wanted, slot, self.slots + self.ring)[:, None, None, None]
        for held in (self.k, self.v):
            batch, heads, _, dim = held.shape
            one = held.index_select(2, (self.slots + leaves.clamp(min=0) % self.ring)[None])
            held.scatter_(2, slot.expand(batch, heads, 1, dim), one)

    def _growing(self) -> FullState:
        """The growing form, of what is held now."""
        growing, total = self.new(), int(self.total)
        if not total:
            return growing
        oldest, end = int(self.least), self.slots + self.ring
        if not oldest:  # all tokens, in order
            whole = slice(self.slots, self.slots + total)
            growing.k, growing.v = self.k[:, :, whole], self.v[:, :, whole]
            if isinstance(growing, RingState):
                growing.total = total
            return growing
        slots = len(growing.slot_positions(oldest))
        growing.k, growing.v = (
            torch.cat([x[:, :, :slots], x[:, :, self.slots : end]], dim=2) for x in (self.k, self.v)
        )
        growing.slots_at = self._places[:slots] if slots else None
        growing.total, growing.oldest, growing.wrapped, growing.pending = total, oldest, True, True
        return growing

    def _take(self, growing: FullState) -> None:
        """Holds what the growing form does."""
        slots, oldest = 0, getattr(growing, "oldest", 0)
        if getattr(growing, "wrapped", False):
            slots = growing.slots
            for held, x in ((self.k, growing.k), (self.v, growing.v)):
                held[:, :, :slots] = x[:, :, :slots]
                held[:, :, self.slots : -1] = x[:, :, slots:]
        elif growing.k is not None:
            whole = slice(self.slots, self.slots + growing.k.shape[2])
            self.k[:, :, whole], self.v[:, :, whole] = growing.k, growing.v
        self.total.fill_(growing._seen())
        self.least.fill_(oldest)

    def _check_crop(self, n: int) -> None:
        self._growing()._check_crop(n)

    def _crop(self, n: int) -> None:
        self.total.fill_(n)

    def _reset(self) -> None:
        super()._reset()
        if self.least is not None:
            self.least.zero_()

    def _release(self) -> None:
        self.k = self.v = self.total = self.least = None

    def _rows(self, how: Callable[[Tensor], Tensor]) -> None:
        least, places = self.least, self._places
        self.least = self._places = None
        super()._rows(how)
        self.least, self._places = None if least is None else least.clone(), places
        self.stay()
