"""What an eviction left: keys and values of which each head has its own number.

B: rows; H: key/value heads; T: tokens; D, Dv: of a key, of a value; R: rows that are stored; N:
tokens of all heads of all stored rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..latent.packed import PackedLatents, pack_rows
from ..pack import Coding


def encode(x: Tensor, coding: Coding | None) -> Tensor:
    """x (B, H, T, D) as it is stored: itself, or each token packed into a row of bytes (B, H, T,
    width) uint8."""
    return x if coding is None else pack_rows(x.contiguous(), coding)


@dataclass(frozen=True, eq=False)
class Ragged:
    """Keys and values, one head's tokens behind the other's, in order.

    k (N, D), v (N, Dv), or the rows of bytes that `encode` makes of them; `codings` says which.
    begin (R H + 1,) int64: where the tokens of head h of stored row r begin, at r H + h. of (B,)
    int64: which stored row each row has, so that rows may share one. lengths, rows: `begin`'s
    differences and `of` on the host. dims, dtype: of keys and values as they are read."""

    k: Tensor
    v: Tensor
    begin: Tensor
    of: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    dims: tuple[int, int]
    dtype: torch.dtype
    codings: tuple[Coding | None, Coding | None] = (None, None)

    @classmethod
    def of_mask(
        cls,
        k: Tensor,
        v: Tensor,
        stays: Tensor,
        dims: tuple[int, int],
        dtype: torch.dtype,
        codings: tuple[Coding | None, Coding | None] = (None, None),
    ) -> Ragged:
        """Of k (B, H, T, ...) and v, as stored, the tokens that stay (B, H, T) bool: a copy."""
        lengths = stays.sum(dim=2).flatten()
        begin = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(len(k), device=k.device)
        return cls(
            k[stays],
            v[stays],
            begin,
            rows,
            tuple(lengths.tolist()),
            tuple(range(len(k))),
            dims,
            dtype,
            codings,
        )

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return len(self.lengths) // self.stored

    @property
    def stored(self) -> int:
        """Rows that are stored."""
        return max(self.rows, default=0) + 1

    @property
    def most(self) -> int:
        """Tokens of the head that has the most."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Of all that is held."""
        return sum(x.nbytes for x in self.tensors())

    @property
    def packed(self) -> bool:
        """Whether they are rows of bytes."""
        return self.codings != (None, None)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.k, self.v, self.begin, self.of

    def map(self, how: Callable[[Tensor], Tensor]) -> Ragged:
        """With `how` of every tensor."""
        k, v, begin, of = map(how, self.tensors())
        return replace(self, k=k, v=v, begin=begin, of=of)

    def edges(self) -> list[int]:
        """`begin` on the host."""
        at = [0]
        for length in self.lengths:
            at.append(at[-1] + length)
        return at

    def read(self, low: int = 0, high: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the stored tokens [low, high), (n, D) and (n, Dv), as numbers."""
        found = []
        for x, dim, coding in zip((self.k, self.v), self.dims, self.codings, strict=True):
            some = x[low:high]
            if coding is not None:
                some = PackedLatents(some[None], dim, coding, self.dtype).unpacked()[0]
            found.append(some)
        return found[0], found[1]

    def unpacked(self) -> Ragged:
        """The same as numbers."""
        if not self.packed:
            return self
        k, v = self.read()
        return replace(self, k=k, v=v, codings=(None, None))

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """k (B, H, most, ...), v and which of them are there (B, H, most) bool: as stored, each
        head's tokens on the right, so that what came later may lie behind them."""
        place = torch.arange(self.most, device=self.k.device) - self.most
        end = self.begin[1:].view(self.stored, self.heads)[self.of]
        length = self.begin.diff().view(self.stored, self.heads)[self.of]
        there = place >= -length[..., None]
        at = (end[..., None] + place).clamp(min=0)
        return self.k[at], self.v[at], there

    def select(self, index: Tensor) -> Ragged:
        """The rows of `index` (N,) int64: the same memory, without stored rows that nobody has."""
        rows = [self.rows[row] for row in index.tolist()]
        kept = sorted(set(rows))
        if len(kept) == self.stored:
            of = self.of.index_select(0, index.to(self.of.device))
            return replace(self, of=of, rows=tuple(rows))
        edges, heads = self.edges(), self.heads
        runs = [slice(edges[row * heads], edges[(row + 1) * heads]) for row in kept]
        nothing = slice(0, 0)
        k, v = (torch.cat([x[run] for run in runs or [nothing]]) for x in (self.k, self.v))
        lengths = [n for row in kept for n in self.lengths[row * heads : (row + 1) * heads]]
        place = {row: at for at, row in enumerate(kept)}
        rows = [place[row] for row in rows]
        device = self.begin.device
        begin = torch.tensor(lengths, dtype=torch.int64, device=device).cumsum(0)
        return replace(
            self,
            k=k,
            v=v,
            begin=torch.nn.functional.pad(begin, (1, 0)),
            of=torch.tensor(rows, dtype=torch.int64, device=device),
            lengths=tuple(lengths),
            rows=tuple(rows),
        )

    def repeat(self, n: int) -> Ragged:
        """Each row n times, side by side: the same memory."""
        rows = tuple(row for row in self.rows for _ in range(n))
        return replace(self, of=self.of.repeat_interleave(n), rows=rows)
