"""The static form of a `PackedRing`: a window of packed keys and values, with sinks, whose tensors
never change their shapes, so that a decoding step is one graph.

What a step writes lies where it lies in the growing ring; lengths are tensors. A prompt, a chunk
and `crop` go to the growing form, made of what is held, and what it holds afterwards is written
back: both forms give and refuse the same.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; S: sinks; `places`: of
the ring of packed tokens, `size`: of the ring of the newest ones in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from effattn.interface import Call
from effattn.kernels.decode.packed import PackedCache
from effattn.kernels.flash.pattern import Layout, Pattern, first_real
from effattn.kernels.pack import pack
from effattn.quant.formats import Format
from effattn.quant.packed.new import New, check, neutral
from effattn.quant.packed.ring import PackedRing
from effattn.quant.packed.static import StaticState
from effattn.quant.rotation import hadamard


class StaticPackedRing(StaticState):
    """What `PackedRing(format, keep, first)` holds. stored: 0-d int64, as there: tokens from its
    number on are in full precision."""

    evicts = True

    def __init__(self, format: Format, length: int, keep: int, first: int = 0):
        growing = PackedRing(format, keep, first)
        super().__init__(growing.format, length)
        self.keep, self.places = keep, growing.size
        flush = self.format.flush
        # the residual and one group that becomes due; a step packs it, and needs one place more,
        # for nothing, where none does
        self.size, self.room = self.format.residual + flush, self.places + flush
        self.stored: Tensor | None = None

    def everything(self) -> Iterator[Tensor]:
        yield from super().everything()
        if self.stored is not None:
            yield self.stored

    def layout(self, padding_mask: Tensor | None = None) -> Layout:
        start = None if padding_mask is None else first_real(padding_mask)
        # a copy: `total` is written in place before the layout is read for the last time
        return Layout(tail=0 if self.total is None else self.total.clone(), start=start)

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        self._allocate(self._new(k, v, padding_mask))
        growing = self._growing()
        found = growing.append(k, v, padding_mask)
        self._take(growing)
        return found

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `State.attend`; with `call.turn` keys are held raw."""
        new = self._new(k, v, call.padding_mask)
        check(self.format, new, q, call, impl)
        self._allocate(new)
        if q.shape[2] > 1:
            growing = self._growing()
            found = growing.attend(q, k, v, pattern, call, impl, lse)
            self._take(growing)
            return found
        q = hadamard(q) if "k" in self.format.rotate else q
        out, sums = self._step(new, q, pattern, call, impl)
        out = hadamard(out) if "v" in self.format.rotate else out
        return (out, sums) if lse else out

    def _step(
        self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str
    ) -> tuple[Tensor, Tensor]:
        """One token: nothing here asks the device for a number."""
        past = self.total.clone()
        for held, x in zip(self.rest, (new.k, new.v), strict=True):
            held.index_copy_(2, (past % self.size)[None], x)
        self._fill_first(new, past, past + 1)
        self.total.add_(1)
        cache = self._cache(new, self.stored.clone(), past + 1, past + 1)
        out = self._read(q, cache, pattern, call, impl)
        border, flush = self.border(past + 1), self.format.flush
        if self.places:
            # the group that became due by this token; or, for nothing, what lies where it would
            due = border - flush + torch.arange(flush, device=q.device)
            place = (border - flush - self.format.first) % self.places
            place = torch.where(border > self.stored, place, self.places)
            for codes, held in zip(self.codes, self.rest, strict=True):
                group = held.index_select(2, due % self.size)
                group = neutral(group, codes.coding, due, new, self.format.first)
                codes.put(place, pack(group, codes.coding))
        self.stored.copy_(torch.maximum(self.stored, border))
        return out

    def _cache(self, new: New, border, held, total) -> PackedCache:
        """Packed tokens below `border`, of which the newest lie in the ring, and the others below
        `held`, in full precision."""
        cache = super()._cache(new, border, held, total)
        place, first = torch.arange(self.room, device=new.k.device), self.format.first
        number = border - 1 - (border - 1 - first - place) % max(1, self.places)
        number = torch.where((number >= first) & (place < self.places), number, -1)
        mask = cache.mask
        if mask is not None:
            slots, last = mask.shape[1] - self.room - self.size, new.mask.shape[1] - 1
            there = new.mask.index_select(1, number.clamp(0, last))
            mask = torch.cat([mask[:, :slots], there, mask[:, slots + self.room :]], dim=1)
        return replace(cache, packed_numbers=number, mask=mask)

    def _allocate(self, new: New) -> None:
        if self.codes is None:
            self.stored = torch.zeros((), dtype=torch.int64, device=new.k.device)
        super()._allocate(new)

    # The growing form
    # ----------------------------------------------------------------------------------------------

    def _growing(self) -> PackedRing:
        """It, with what is held now, in memory of its own."""
        growing, total, stored = self._empty(), int(self.total or 0), int(self.stored or 0)
        if not total:
            return growing
        first = self.format.first
        begin = min(max(stored, first), total)
        growing.total, growing.begin, growing.stored = total, begin, begin
        order = torch.arange(begin, total, device=self.total.device) % self.size
        growing.rest = tuple(x.index_select(2, order) for x in self.rest)
        if first:
            growing.first_kv = tuple(x[:, :, : min(first, total)].clone() for x in self.first_kv)
        if self.places and stored > first:
            growing.pages = [tuple(x[: self.places].map(torch.clone) for x in self.codes)]
            growing.newest = stored
        return growing

    def _empty(self) -> PackedRing:
        return PackedRing(self.format, self.keep, self.format.first)

    def _take(self, growing: PackedRing) -> None:
        """Holds what the growing form does."""
        if growing.pages:
            for held, codes in zip(self.codes, growing.pages[0], strict=True):
                held.put(0, codes)
        place = torch.arange(growing.begin, growing.total, device=self.total.device) % self.size
        for held, x in zip(self.rest, growing.rest or (), strict=False):
            held.index_copy_(2, place, x)
        for held, x in zip(self.first_kv or (), growing.first_kv or (), strict=False):
            held[:, :, : x.shape[2]] = x
        self.total.fill_(growing.total)
        self.stored.fill_(growing.stored)

    def _check_crop(self, n: int) -> None:
        self._growing()._check_crop(n)

    def _crop(self, n: int) -> None:
        growing = self._growing()
        growing.crop(n)
        self._take(growing)

    def _rows(self, how: Callable[[Tensor], Tensor]) -> None:
        stored, self.stored = self.stored, None
        super()._rows(how)
        self.stored = None if stored is None else stored.clone()
        self.stay()

    def _reset(self) -> None:
        super()._reset()
        if self.stored is not None:
            self.stored.zero_()

    def _release(self) -> None:
        super()._release()
        self.stored = None
