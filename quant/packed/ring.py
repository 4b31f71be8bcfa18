"""A window of packed keys and values: the quantized cache of `sliding` (with sinks) and `block`.

What a window can still see of the packed tokens lies in a ring of whole groups, which new groups
overwrite in place; nothing is moved. Sinks stay in full precision, and so do the newest tokens, as
in `PackedState`.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; S: first tokens (sinks);
`size`: places of the ring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from effattn.kernels.pack import Codes
from effattn.quant.formats import Format
from effattn.quant.packed.new import New
from effattn.quant.packed.state import PackedState
from effattn.states.full import ROLLBACK


class PackedRing(PackedState):
    """`keep`: the newest tokens that a query sees, its own included. `first`: sinks.

    The ring has places for `size` tokens (0 when the residual is as long as the window): token
    number t, packed, lies at (t - S) % size until a later one takes its place, at least `ROLLBACK`
    tokens after the last query that sees it."""

    evicts = True

    def __init__(self, format: Format, keep: int, first: int = 0):
        # what a window cannot see need not be in full precision
        self.keep = keep
        super().__init__(replace(format, residual=min(format.residual, keep + ROLLBACK)), first)
        self.size = (
            -(-(keep + ROLLBACK - self.format.residual) // self.format.flush) * self.format.flush
        )

    def _reset(self) -> None:
        super()._reset()
        # everything below this number has been packed once: what the ring's places are counted from
        self.newest = 0

    def predicted_bytes(
        self,
        tokens: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        value_dim: int | None = None,
    ) -> int:
        first, packed, rest = self.format.held(tokens)
        value_dim = value_dim or head_dim
        places = self.size if packed else 0  # all of them are made with the first that is taken
        ring = self.format.k.nbytes(places, head_dim) + self.format.v.nbytes(places, value_dim)
        return batch * kv_heads * ((first + rest) * (head_dim + value_dim) * itemsize + ring)

    def runs(self) -> Iterator[tuple[Codes, Codes, Tensor]]:
        for k, v in self.pages:
            # the number of the newest token that was ever packed at each place, counted back from
            # the newest of all; after a crop some are not there any more (`stored`)
            place = torch.arange(self.size, device=k.device)
            behind = self.newest - 1 - self.format.first
            number = self.newest - 1 - (behind - place) % self.size
            real = (number >= self.format.first) & (number < self.stored)
            yield k, v, torch.where(real, number, -1)

    def _worth_packing(self, border: int) -> int:
        return max(super()._worth_packing(border), border - self.size)

    def _pack(self, border: int, sources: list, new: New) -> None:
        # all of them before anything is overwritten: packing may fail, storing cannot
        for at, k, v in list(self._packed(border, sources, new)):
            self._store(at, k, v)
        self.stored = max(self.stored, border)

    def _store(self, at: int, k: Codes, v: Codes) -> None:
        if not self.pages:
            shape = k.shape[:2]
            self.pages.append(
                tuple(
                    Codes.empty(codes.coding, *shape, self.size, codes.dim, codes.device)
                    for codes in (k, v)
                )
            )
        place = (at - self.format.first) % self.size
        for held, codes in zip(self.pages[0], (k, v), strict=True):
            before_end = min(codes.tokens, self.size - place)
            held.put(place, codes[:before_end])
            if before_end < codes.tokens:
                held.put(0, codes[before_end:])
        self.newest = max(self.newest, at + k.tokens)

    def _least(self) -> int:
        gone = self.newest - self.size  # the oldest token in the ring, if it is full
        return max(super()._least(), gone + self.keep - 1 if gone > self.format.first else 1)

    def _rewind(self, total: int, stored: int, begin: int, rest, first_kv) -> None:
        super()._rewind(total, stored, begin, rest, first_kv)
        # a call failed half way, and what it overwrote cannot be brought back: better nothing at
        # all
        if total < self._least() and total:
            self.reset()

    def _unstore(self, stored: int) -> None:
        """Nothing to do: tokens from `stored` on are not counted as there any more."""
