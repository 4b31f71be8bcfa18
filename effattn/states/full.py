"""What a backend remembers of one batch of sequences while it decodes: everything, or a ring and a
few first tokens.

    state = attn.new_state()
    y = attn(q, k, v, state=state)        # k, v: the new tokens

Tokens are numbered from 0, padding included; a row's positions count from its first real token.
All sizes are in tokens.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; S: slots, places of
tokens that outlive the ring; W: places of the ring, `keep` + `ROLLBACK`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout, first_real, layout_of
from effattn.states.base import State
from effattn.states.sizes import check_fits

__all__ = [
    "ROLLBACK",
    "ROOM",
    "FullState",
    "RingState",
    "first_positions",
    "no_positions",
]

ROOM = 64  # tokens that memory which grows has room for
# tokens that a ring keeps beyond its need, so that speculative decoding can take them back
ROLLBACK = 16


def first_positions(count: int, n: int) -> list[int]:
    """`slot_positions` of a `RingState` that keeps the first `count` tokens (sinks): those below n.

    A list, since torch.compile traces it."""
    return [p for p in range(count) if p < n]


def no_positions(n: int) -> tuple[int, ...]:
    """Slots of a ring that keeps no first tokens: none."""
    return ()


class FullState(State):
    """Every key and value, as they came. `rooms`: the memory that k and v are views of once they
    have grown; there is room for up to `room` tokens more, so that a step writes its own token and
    copies the others every `room` steps."""

    evicts = False
    read_by_method = False
    rooms: tuple[Tensor, Tensor] | None = None
    room = ROOM  # tokens that new memory has room for

    def __init__(self):
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def in_order(self) -> bool:
        """Whether k and v are all tokens, in the order they came, and all there is."""
        return type(self) is FullState

    def _seen(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def _bytes(self) -> int:
        """Bytes of the tokens that are held; room for more is not counted."""
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Returns all keys and values, (B, Hkv, seq_len, D) and (B, Hkv, seq_len, Dv), in the new
        ones' dtype. ValueError for new ones that do not fit those that are held."""
        if self.k is None:
            self.k, self.v = k, v
        else:
            check_fits(self.k, self.v, k, v)
            self.k, self.v = self._grown(k, v)
        return self.k, self.v, layout_of(padding_mask)

    def _grown(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values with the new ones."""
        # Room is written in place, which autograd would take for a change of what it has saved, and
        # which a compiled graph would have to be guarded against. Both get new tensors.
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, self.k, self.v))
        if learning or self.learning or torch.compiler.is_compiling():
            self.rooms = None
            return torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        past, new = self.k.shape[2], k.shape[2]
        total, rooms = past + new, self.rooms
        # tensors made under inference_mode refuse to be written outside of it
        if (
            rooms is None
            or rooms[0].shape[2] < total
            or (rooms[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            rooms = self.rooms = self._roomy(past, total + self.room)
        of_k, of_v = rooms
        of_k.narrow(2, past, new).copy_(k)
        of_v.narrow(2, past, new).copy_(v)
        return of_k.narrow(2, 0, total), of_v.narrow(2, 0, total)

    def _roomy(self, past: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Memory for so many tokens of k and v, with the past ones in it."""
        rooms = tuple(x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in (self.k, self.v))
        for room, x in zip(rooms, (self.k, self.v), strict=True):
            room[:, :, :past] = x
        return rooms

    def _select(self, index: Tensor) -> None:
        if self.k is not None:
            self.k, self.v = self.k.index_select(0, index), self.v.index_select(0, index)
            self.rooms = None

    def _repeat(self, n: int) -> None:
        if self.k is not None:
            self.k, self.v = self.k.repeat_interleave(n, dim=0), self.v.repeat_interleave(n, dim=0)
            self.rooms = None

    def _crop(self, n: int) -> None:
        self.k, self.v = self.k[:, :, :n].clone(), self.v[:, :, :n].clone()
        self.rooms = None

    def _reset(self) -> None:
        self.k = self.v = self.rooms = None

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        self.rooms = None
        super()._change(how)


class RingState(FullState):
    """The newest `keep` tokens (a query's own included) in a ring, and chosen earlier ones in slots
    before it.

    Until keep + ROLLBACK tokens have come, all are held in order. From then on k and v are one
    buffer (B, Hkv, S + W, D): token t lies at S + t % W, a decoding step overwrites in place,
    nothing is moved. `slot_positions(n)`: the positions below n that must outlive the ring (sinks,
    global tokens), ascending; what it gives for a smaller n is a prefix.

    A slot is filled when its token is about to leave the ring, and never before: until then the
    token is read from the ring, and must not be scored twice. Rows with padding on the left reach a
    position later than others, so that a slot can be there for one row and pending for another."""

    evicts = True

    def __init__(self, keep: int, slot_positions: Callable[[int], Sequence[int]] = no_positions):
        self.keep, self.ring = keep, keep + ROLLBACK
        self.slot_positions = slot_positions
        self.reset()

    def _reset(self) -> None:
        self.k = self.v = self.slots_at = self.behind = None
        self.total = 0  # tokens seen
        self.oldest = 0  # the oldest token that is held in the ring
        self.wrapped = False  # whether k and v are slots and a ring by now
        self.pending = False  # whether some row's slot waits for its token still

    @property
    def in_order(self) -> bool:
        return type(self) is RingState and not self.wrapped

    def _seen(self) -> int:
        return self.total

    def held(self, tokens: int) -> int:
        """How many tokens are held once `tokens` have come."""
        return (
            tokens
            if tokens <= self.ring
            else self.ring + len(self.slot_positions(tokens - self.ring))
        )

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Returns what is held with the new tokens: in order, or as the ring lies when a few tokens
        came.
        """
        if self.k is not None:
            check_fits(self.k, self.v, k, v)
        total = self.total + k.shape[2]
        if not self.wrapped and total <= self.ring:
            self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
            self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
            self.total = total
            return self.k, self.v, layout_of(padding_mask)
        simple = self.wrapped and k.shape[2] == 1 and padding_mask is None and not self.pending
        if simple and (found := self._one(k, v)):
            return found
        start = None if padding_mask is None else first_real(padding_mask)
        learning = torch.is_grad_enabled() and any(
            x.requires_grad for x in (k, v, self.k, self.v) if x is not None
        )
        if self.wrapped and k.shape[2] <= ROLLBACK and not (learning or self.learning):
            return self._few(k, v, total, start, padding_mask)
        return self._many(k, v, total, start, padding_mask)

    def _one(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Layout] | None:
        """One token where the host knows where all lie: no slot waits for one, and nothing is
        padding. None where it becomes more: a slot is due, or gradients flow."""
        total, oldest = self.total + 1, max(self.oldest, self.total + 1 - self.ring)
        learning = torch.is_grad_enabled() and (k.requires_grad or self.k.requires_grad)
        if learning or self.learning or torch.compiler.is_compiling():
            return None
        slots = self.slots
        if oldest > self.oldest and len(self.slot_positions(oldest)) > slots:
            return None
        place = self.total % self.ring
        self.k.narrow(2, slots + place, 1).copy_(k)
        self.v.narrow(2, slots + place, 1).copy_(v)
        self.total, self.oldest = total, oldest
        # how far before the newest token the one at each place is: a part of one and the same table
        if self.behind is None or self.behind.device != k.device:
            self.behind = -torch.arange(2 * self.ring, device=k.device) % self.ring
        number = self.total - 1 - self.behind.narrow(0, self.ring - place, self.ring)
        if oldest != total - self.ring:
            number = torch.where(number >= oldest, number, -1)
        return self.k, self.v, Layout(slots, 0, None, None, self._places(slots), number, total)

    def _few(self, k, v, total, start, padding_mask) -> tuple[Tensor, Tensor, Layout]:
        """Overwrites the ring's oldest tokens in place."""
        before = self.oldest
        # Slots first: the new tokens are about to overwrite what they have to copy.
        self._grow_slots(max(before, total - self.ring), k.device)
        slots = self.slots
        self._fill_slots(self.k, self.v, before, self.total, start, ring=True)
        at = slots + torch.arange(self.total, total, device=k.device) % self.ring
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        self.total, self.oldest = total, max(before, total - self.ring)
        # The ring goes out as it lies, and `number` says which token is at each place: the newest t
        # below `total` with t % ring == place. One older than `oldest` is not there: a crop took
        # back what had overwritten it.
        places = torch.arange(self.ring, device=k.device)
        number = total - 1 - (total - 1 - places) % self.ring
        number = torch.where(number >= self.oldest, number, -1)
        mask = None
        if padding_mask is not None:
            real = padding_mask.index_select(1, number.clamp(min=0)) & (number >= 0)
            mask = torch.cat([self._outlived(slots, self.oldest, start), real], dim=1)
        return self.k, self.v, Layout(slots, 0, start, mask, self._places(slots), number, total)

    def _many(self, k, v, total, start, padding_mask) -> tuple[Tensor, Tensor, Layout]:
        """Puts the past and the new tokens in order, and keeps the end of them as the ring."""
        # k and v become all tokens [low, total) in order: what is held, then the new ones
        low, past = self.oldest, self.total
        if self.k is not None:
            at = torch.arange(low, past, device=k.device)
            at = self.slots + at % self.ring if self.wrapped else at - low
            k = torch.cat([self.k.index_select(2, at), k], dim=2)
            v = torch.cat([self.v.index_select(2, at), v], dim=2)
        old = (
            (self.k[:, :, : self.slots], self.v[:, :, : self.slots])
            if self.wrapped
            else (k[:, :, :0], v[:, :, :0])
        )
        # new memory, not the old one overwritten: gradients may flow through what was there
        self.oldest, self.total = max(low, total - self.ring), total
        at = torch.arange(self.oldest, total, device=k.device)
        rings = (x.new_zeros(*x.shape[:2], self.ring, x.shape[3]) for x in (k, v))
        rings = (
            r.index_copy(2, at % self.ring, x[:, :, self.oldest - low :])
            for r, x in zip(rings, (k, v), strict=True)
        )
        self.k, self.v = (torch.cat(parts, dim=2) for parts in zip(old, rings, strict=True))
        self.wrapped = True
        self._grow_slots(self.oldest, k.device)
        self._fill_slots(k, v, low, total, start, ring=False)
        # What is attended over: the first of the new tokens, number `past`, sees back to
        # past - keep + 1, and no other sees further. What lies before is in the slots.
        tail = max(low, min(past - self.keep + 1, self.oldest))
        if tail == 0:
            return k, v, layout_of(padding_mask)
        slots = len(self.slot_positions(tail))
        mask = None
        if padding_mask is not None:
            mask = torch.cat([self._outlived(slots, tail, start), padding_mask[:, tail:]], dim=1)
        k = torch.cat([self.k[:, :, :slots], k[:, :, tail - low :]], dim=2)
        v = torch.cat([self.v[:, :, :slots], v[:, :, tail - low :]], dim=2)
        return k, v, Layout(slots, tail, start, mask, self._places(slots))

    @property
    def slots(self) -> int:
        """How many first tokens are held."""
        return 0 if self.slots_at is None else len(self.slots_at)

    def _places(self, slots: int) -> Tensor | None:
        """The slots' positions for a `Layout`; None when they are 0, 1, 2, ..."""
        positions = self.slot_positions(self.oldest)
        # they ascend from 0 or more: if the last is where it would be counted, all are
        in_order = slots == 0 or positions[slots - 1] == slots - 1
        return None if in_order else self.slots_at[:slots]

    def _grow_slots(self, tokens: int, device) -> None:
        """Makes room for every slot that positions below `tokens` need."""
        positions = self.slot_positions(tokens)
        if (more := len(positions) - self.slots) > 0:
            self.k, self.v = (
                torch.cat(
                    [
                        x[:, :, : self.slots],
                        x.new_zeros(*x.shape[:2], more, x.shape[3]),
                        x[:, :, self.slots :],
                    ],
                    dim=2,
                )
                for x in (self.k, self.v)
            )
            # a copy that the host does not wait for
            self.slots_at = torch.tensor(list(positions)).to(device, non_blocking=True)
            self.pending = True

    def _fill_slots(
        self, k: Tensor, v: Tensor, low: int, high: int, start: Tensor | None, ring: bool
    ) -> None:
        """Copies the tokens numbered [low, high) that belong into slots; k and v hold them in
        order, or as `ring`.
        """
        if not self.pending or not self.slots:
            return
        # (B or 1, S): the number of the token that each row wants in each slot
        number = self.slots_at[None] if start is None else start[:, None] + self.slots_at
        there = ((number >= low) & (number < high))[:, None, :, None]
        at = (self.slots + number % self.ring if ring else (number - low).clamp(0, high - low - 1))[
            :, None, :, None
        ]
        for held, source in ((self.k, k), (self.v, v)):
            found = source.gather(2, at.expand(*source.shape[:2], -1, source.shape[3]))
            held[:, :, : self.slots] = torch.where(there, found, held[:, :, : self.slots])
        # without padding all rows are done at once; with it, a row is when its last one has come
        if start is None:
            self.pending = False
        elif self.late is not None:
            self.pending = self.late + self.slot_positions(high)[self.slots - 1] >= high
        else:
            self.pending = bool((number >= high).any())

    def _outlived(self, slots: int, limit: int, start: Tensor) -> Tensor:
        """(B, slots): which slots hold a token older than `limit`, so that it is not in the ring as
        well.
        """
        return (
            start[:, None] + self.slots_at[:slots] < limit
            if slots
            else start.new_zeros(len(start), 0).bool()
        )

    def _check_crop(self, n: int) -> None:
        # the window of the token that comes next after a crop to n begins at n + 1 - keep
        least = self.oldest + self.keep - 1
        if self.wrapped and self.oldest and n < least:
            raise ValueError(
                f"crop: got {n}, but the tokens that a window ending there needs were evicted; "
                f"valid are 0 and {least} to {self.total}"
            )

    def _crop(self, n: int) -> None:
        if not self.wrapped:
            super()._crop(n)
        # `oldest` stays: what the ring has lost is lost. Slots may hold tokens that were taken
        # back.
        self.total, self.pending = n, True
