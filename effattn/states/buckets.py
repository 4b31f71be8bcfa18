"""What LSH attention remembers while it decodes: for every round and bucket a ring of its newest
keys.

    state = BucketState(rule, hash)
    # rule: `effattn.kernels.lsh.Rule`; hash: keys (B, H, T, D) -> buckets (B, H, R, T)

Keys and values are held once, in order, with a table of which tokens lie in the rings, until the
rings themselves would take no more: from then on every ring holds its own, and memory does not
grow.

B: rows; H, Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; R: rounds of hashing;
N: rows of the store, tokens or slots; S: slots of one round, buckets x ring + 1; M: buckets.

Three numberings meet here. A token's *number* is its place in the sequence; a *slot* is a place of
one round's rings; a *row* is a place of the store, where k, v and code lie. `position` leads from a
slot to a number, `_rows` from a slot to a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout
from effattn.kernels.lsh import NO_KEY, Past, Rule, Seen, new_ranks
from effattn.states.full import ROLLBACK, FullState
from effattn.states.sizes import check_fits

STEP = 64  # rows that are made room for at a time, so that a token seldom moves all others
NAMES = ("k", "v", "code", "position", "count")


@dataclass(frozen=True)
class Hashed(Layout):
    """Keys (a store of N rows, the T new ones last, or somewhere if there is `seen`) with their
    buckets.

    bucket (B, H, R, T) int64: of the new keys, `rule.buckets` for padding; code (B, H, R, N): the
    places of all rows; past: keys before the new ones; seen: how a few queries find theirs."""

    bucket: Tensor | None = None
    code: Tensor | None = None
    past: Past | None = None
    seen: Seen | None = None


class BucketState(FullState):
    """k (B, Hkv, N, D), v (B, Hkv, N, Dv), the rows' places `code` (B, Hkv, R, N) int32; `position`
    (B, Hkv, R, S) int32, which token lies in each slot of the rings (-1: none); `count` (B, Hkv, R,
    M) int32 of the tokens so far.

    The key of rank x in bucket b lies in slot b ring + x % ring; one more slot in each round takes
    what goes nowhere. Rows are the tokens in order at first, with room for a few more; and the
    slots of all rounds from the moment that there are more tokens than slots."""

    read_by_method = True

    def __init__(self, rule: Rule, hash: Callable[[Tensor], Tensor]):
        self.rule, self.hash = rule, hash
        self.ring = 2 * rule.chunk + ROLLBACK  # what a query sees, and what may be taken back
        self.reset()

    @staticmethod
    def size(rule: Rule, tokens: int, row_bytes: int) -> int:
        """Bytes of one key/value head after `tokens`, with `row_bytes` for a key and its value."""
        slots = rule.rounds * (rule.buckets * (2 * rule.chunk + ROLLBACK) + 1)
        rows = min(-(-tokens // STEP) * STEP, slots)
        return rows * (row_bytes + 4 * rule.rounds) + 4 * (slots + rule.rounds * rule.buckets)

    def _reset(self) -> None:
        self.k = self.v = self.code = self.position = self.count = None
        self.total = 0  # tokens seen
        self.newest = 0  # the most there ever were: what is gone for good
        self.wrapped = False  # whether rows are slots by now

    def _seen(self) -> int:
        return self.total

    def _bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in NAMES) if self.k is not None else 0

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Hashed]:
        """Returns a store of keys and values, and a `Hashed` layout of them."""
        if self.k is None:
            self._start(k, v)
        check_fits(self.k, self.v, k, v)
        # 1. Where the new keys belong: their buckets, their ranks there (how many older keys each
        #    has), and so their slots. Padding goes to a bucket of its own, which no
        #    query looks at.
        bucket, new = self.hash(k), k.shape[2]
        mask = None if padding_mask is None else padding_mask[:, self.total :]
        if mask is not None:
            bucket = torch.where(mask[:, None, None], bucket, self.rule.buckets)
        before = self.count.long()
        rank, count = new_ranks(bucket, self.rule.buckets, before)
        code = torch.where(bucket < self.rule.buckets, self.rule.code(bucket, rank), NO_KEY).int()
        slot = self._slots(bucket, rank, count)
        learning = torch.is_grad_enabled() and (
            k.requires_grad or v.requires_grad or self.k.requires_grad
        )
        # 2. What the queries will look at. A few find their keys slot by slot (`Seen`), after the
        #    new ones are in their places. Many sort all keys by bucket, and need those of the past
        #    as they are now, before the new ones push some out.
        few = new <= ROLLBACK and not (learning or self.learning)
        past = self._past() if self.total and not few else None
        rows = self._rows()

        # 3. The new keys into their slots
        position = torch.arange(self.total, self.total + new, device=k.device)
        self.position = self.position.scatter(3, slot, position.int().expand(slot.shape))
        held = self.k.shape[2] if self.wrapped else self.total
        self.count, self.total = count.int(), self.total + new
        self.newest = max(self.newest, self.total)
        # 4. The new keys into the store: over the rows of their slots, into the room behind the
        #    others, or with the others into a new store, which is what is attended over then even
        #    where less of it is kept.
        if few and self.wrapped:
            self._overwrite(k, v, code, slot)
            store, own = (self.k, self.v, self.code), slot[:, :, 0]
        elif few and self.total <= self.k.shape[2]:
            self.k[:, :, held : self.total], self.v[:, :, held : self.total] = k, v
            self.code[..., held : self.total] = code
            store, own, rows = (
                (self.k, self.v, self.code),
                position.expand(*k.shape[:3]),
                self.position,
            )
        else:
            store = tuple(
                torch.cat([x[:, :, :held], new], dim=2) for x, new in ((self.k, k), (self.v, v))
            )
            store = *store, torch.cat([self.code[..., :held], code], dim=3)
            own = torch.arange(held, store[0].shape[2], device=k.device)
            rows = rows.scatter(3, slot, own.to(rows.dtype).expand(slot.shape))
            own = own.expand(*k.shape[:3])
            slots = rows.shape[2] * rows.shape[3]
            if self.wrapped or self.total > slots:
                self._gather(store, rows)
            else:
                more = min(-(-self.total // STEP) * STEP, slots) - self.total
                self.k, self.v = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in store[:2])
                self.code = torch.nn.functional.pad(store[2], (0, more), value=NO_KEY)
        seen = Seen(self.rule, self.ring, rows, store[2], before, bucket, own) if few else None
        return *store[:2], Hashed(mask=mask, bucket=bucket, code=store[2], past=past, seen=seen)

    def _start(self, k: Tensor, v: Tensor) -> None:
        lines = (*k.shape[:2], self.rule.rounds)
        slots = self.rule.buckets * self.ring + 1
        self.k, self.v = k[:, :, :0], v[:, :, :0]
        self.code = torch.empty((*lines, 0), dtype=torch.int32, device=k.device)
        self.position = torch.full((*lines, slots), -1, dtype=torch.int32, device=k.device)
        self.count = torch.zeros((*lines, self.rule.buckets), dtype=torch.int32, device=k.device)

    def _rows(self) -> Tensor:
        """(B, Hkv, R, slots): the row that each slot's key is in."""
        if not self.wrapped:
            return self.position
        rounds, slots = self.position.shape[2:]
        return (
            torch.arange(rounds * slots, device=self.k.device)
            .view(rounds, slots)
            .expand(self.position.shape)
        )

    def _slots(self, bucket: Tensor, rank: Tensor, count: Tensor) -> Tensor:
        """Where new keys go, (B, Hkv, R, T): the last slot for padding, and for those that even
        newer ones push out (two keys of a `scatter` must not meet in one slot).
        """
        count = torch.cat([count, torch.zeros_like(count[..., :1])], dim=-1).gather(-1, bucket)
        stays = (bucket < self.rule.buckets) & (rank >= count - self.ring)
        return torch.where(
            stays, bucket * self.ring + rank % self.ring, self.rule.buckets * self.ring
        )

    def _past(self) -> Past:
        """All that lies in the rings, the oldest first."""
        # of every bucket the `ring` newest ranks: those below 0 were never there, and those whose
        # slot is -1 were taken back
        count = self.count.long()[..., None]
        rank = count - self.ring + torch.arange(self.ring, device=count.device)
        buckets = torch.arange(self.rule.buckets, device=count.device)[:, None]
        slot = (buckets * self.ring + rank % self.ring).flatten(3)
        there = (rank.flatten(3) >= 0) & (self.position.gather(3, slot) >= 0)
        rows = self._rows().gather(3, slot).long().clamp(min=0)
        bucket = buckets.expand(rank.shape).flatten(3)
        return Past(rows, torch.where(there, bucket, self.rule.buckets), count[..., 0])

    def _overwrite(self, k: Tensor, v: Tensor, code: Tensor, slot: Tensor) -> None:
        """Puts new tokens into the slots of every round."""
        row = self._rows().gather(3, slot).flatten(2)  # (B, Hkv, R T)
        rounds = slot.shape[2]
        for held, new in ((self.k, k), (self.v, v)):
            new = new.repeat(1, 1, rounds, 1)
            held.scatter_(2, row[..., None].expand(new.shape), new)
        new = code.repeat(1, 1, 1, rounds)
        self.code.scatter_(3, row[:, :, None].expand(new.shape), new)

    def _gather(self, store: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> None:
        """From now on a row is a slot, if it was not before."""
        rows = rows.flatten(2).long().clamp(min=0)
        self.k, self.v = (
            x.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[3])) for x in store[:2]
        )
        self.code = store[2].gather(3, rows[:, :, None].expand(-1, -1, self.rule.rounds, -1))
        self.wrapped = True

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.k is not None:
            for name in NAMES:
                setattr(self, name, change(getattr(self, name)))

    def _select(self, index: Tensor) -> None:
        self._each(lambda x: x.index_select(0, index))

    def _repeat(self, n: int) -> None:
        self._each(lambda x: x.repeat_interleave(n, dim=0))

    def _check_crop(self, n: int) -> None:
        least = self.newest - ROLLBACK
        if self.wrapped and n < least:
            raise ValueError(
                f"crop: got {n}, but tokens that are seen from there were overwritten; valid are "
                f"0 and {least} to {self.total}"
            )

    def _crop(self, n: int) -> None:
        if not self.wrapped:
            # all tokens are still there: the rings of the first n are filled anew from their codes
            k, v, code = (
                self.k[:, :, :n].contiguous(),
                self.v[:, :, :n].contiguous(),
                self.code[..., :n].contiguous(),
            )
            bucket = torch.where(code < 0, self.rule.buckets, code % self.rule.buckets).long()
            self._start(k, v)
            rank, count = new_ranks(bucket, self.rule.buckets)
            slot = self._slots(bucket, rank, count)
            position = torch.arange(n, dtype=torch.int32, device=k.device).expand(slot.shape)
            self.position = self.position.scatter(3, slot, position)
            self.k, self.v, self.code, self.count, self.total, self.newest = (
                k,
                v,
                code,
                count.int(),
                n,
                n,
            )
        else:
            # Emptying the slots of the tokens that go is enough: a ring holds `ROLLBACK` keys more
            # than a query sees, so what those had overwritten is out of sight.
            slots = self.position[..., :-1].unflatten(3, (self.rule.buckets, self.ring))
            gone = slots >= n
            self.count = self.count - gone.sum(dim=-1, dtype=torch.int32)
            self.position = torch.nn.functional.pad(
                slots.masked_fill(gone, -1).flatten(3), (0, 1), value=-1
            )
            self.total = n
