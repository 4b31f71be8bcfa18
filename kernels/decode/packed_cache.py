"""A cache whose older tokens are packed (`effattn.kernels.pack`), as its kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pack.codes import Codes, Pages


@dataclass
class PackedCache:
    """K and V of one layer, in up to three parts. Tokens are numbered from 0 in each row, padding
    included, and the queries are the last ones of `total`; a token's position is its number minus
    its row's `start`.

    k_first, v_first (B, Hkv, S, D), (B, Hkv, S, Dv): the tokens at POSITIONS 0 .. S - 1 of each
        row, in full precision. They are seen from here only: a packed or newest key at a position
        below S is skipped, so a token may be held twice (rows with padding on the left), but must
        be in these slots as soon as it is in the cache.
    k, v: the packed tokens, N of them; key n is token number `packed_from` + n, or
        `packed_numbers[n]`. `Pages` are for plain torch.
    k_rest, v_rest (B, Hkv, R, D), (B, Hkv, R, Dv): the newest tokens in full precision, q's dtype,
        numbers total - R .. total - 1, or `rest_numbers`.
    packed_numbers (N,), rest_numbers (R,) int64: for rings and for buffers with room: -1 is a place
        without a token; numbers may come in any order. What lies there must be finite.
    total: how many tokens there are so far, held or not, the queries' own included; an int, or a
        0-d int64 tensor for graphs that are compiled once (then both numbers are given).
    start (B,) int64: the number of each row's first real token; None: 0.
    mask (B, S + N + R) bool, in the order of the parts: which of the keys are real; None: all.
    """

    k: Codes | Pages
    v: Codes | Pages
    k_rest: Tensor
    v_rest: Tensor
    total: int | Tensor
    k_first: Tensor | None = None
    v_first: Tensor | None = None
    packed_from: int = 0
    packed_numbers: Tensor | None = None
    rest_numbers: Tensor | None = None
    start: Tensor | None = None
    mask: Tensor | None = None

    @property
    def slots(self) -> int:
        """S, first tokens in full precision."""
        return 0 if self.k_first is None else self.k_first.shape[2]

    @property
    def keys(self) -> int:
        """S + N + R."""
        return self.slots + self.k.tokens + self.k_rest.shape[2]

    @property
    def nbytes(self) -> int:
        """Of K and V in all parts."""
        full = (self.k_first, self.v_first, self.k_rest, self.v_rest)
        return self.k.nbytes + self.v.nbytes + sum(x.nbytes for x in full if x is not None)

    def numbers(self) -> Tensor:
        """(N + R,) int64: the numbers of the packed and the newest keys; -1: no token."""
        packed, device = self.packed_numbers, self.k.device
        if packed is None:
            packed = torch.arange(self.packed_from, self.packed_from + self.k.tokens, device=device)
        rest = self.rest_numbers
        if rest is None:
            rest = torch.arange(self.total - self.k_rest.shape[2], self.total, device=device)
        return torch.cat([packed, rest])

    def key_positions(self) -> Tensor:
        """(1 or B, S + N + R) int64: each key's position, -1 for keys that are not to be seen."""
        number = self.numbers()[None]
        origin = 0 if self.start is None else self.start[:, None]
        position = torch.where(number >= 0, number - origin, -1)
        position = torch.where(position >= self.slots, position, -1)
        first = torch.arange(self.slots, device=number.device)
        position = torch.cat([first[None].expand(position.shape[0], -1), position], dim=1)
        return position if self.mask is None else torch.where(self.mask, position, -1)

    def query_positions(self, queries: int) -> Tensor:
        """(1 or B, Tq) int64; negative for padding on the left."""
        number = torch.arange(queries, device=self.k.device)[None] + (self.total - queries)
        return number if self.start is None else number - self.start[:, None]
