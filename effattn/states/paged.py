"""Every key and value in pages of a few tokens, which rows share as long as they are the same:
`cache="paged(page=16)"`.

    state = PagedState(page=16)
    y = attn(q, k, v, state=state)       # the bits of a full cache
    state.repeat(8)                      # eight rows, one prompt in memory

Pages of one pool, and a table for each row that says which of them are its tokens, in order. A page
that several rows have is copied when one of them writes to it (PagedAttention, arXiv:2309.06180).

B: rows; H: key/value heads; T: new tokens; D, Dv: of a key, of a value; P: pages of the pool; S:
tokens of a page; n: pages of a row, which are as many in all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.kernels.flash.pattern import Layout, layout_of
from effattn.specs import parse_spec
from effattn.states.base import State
from effattn.states.caches import Heads, Holder, LayerCache, full_bytes, register
from effattn.states.full import FullState
from effattn.states.sizes import check_fits

MOST = 65536  # tokens of a page
SPARE = 8  # a pool that is full grows by the pages that are asked for, and a part of this many


class Pool:
    """k (H, P, S, D) and v (H, P, S, Dv), and of each page how many rows have it. Pages that nobody
    has are free."""

    def __init__(self, page: int):
        self.page = page
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.users: list[int] = []
        self.free: list[int] = []

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.k, self.v  # type: ignore[return-value]

    @property
    def used(self) -> int:
        """Pages that some row has."""
        return len(self.users) - len(self.free)

    @property
    def page_bytes(self) -> int:
        """Of the keys and values of one page."""
        return sum(x.nbytes for x in self.pair) // max(len(self.users), 1)

    def take(self, count: int, k: Tensor, v: Tensor) -> list[int]:
        """So many free pages, which have one user now; k, v: of the sizes that are held."""
        if (short := count - len(self.free)) > 0:
            first = len(self.users)
            more = short if self.k is None else max(short, first // SPARE)
            grown = []
            for held, x in zip(self.pair, (k, v), strict=True):
                room = x.new_zeros(x.shape[1], first + more, self.page, x.shape[3])
                if held is not None:
                    room[:, :first] = held
                grown.append(room)
            self.k, self.v = grown
            self.users += [0] * more
            self.free += reversed(range(first, first + more))
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.users[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """One user more for each of them."""
        for page in pages:
            self.users[page] += 1

    def leave(self, pages: list[int]) -> None:
        """One user less."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def map(self, how: Callable[[Tensor], Tensor]) -> Pool:
        """With `how` of both tensors."""
        if self.k is not None:
            self.k, self.v = (how(x) for x in self.pair)
        return self


class PagedState(State):
    """`pool`, and `table`, for each row its pages. All rows have `total` tokens; the last page is
    filled up to there."""

    evicts = False
    read_by_method = False

    def __init__(self, page: int):
        self.page = page
        self._reset()

    def _reset(self) -> None:
        self.pool = Pool(self.page)
        self.table: list[list[int]] = []
        self.total = 0

    def _seen(self) -> int:
        return self.total

    def _bytes(self) -> int:
        """Bytes of the pages that rows have; those that are free are not counted."""
        return 0 if self.pool.k is None else self.pool.used * self.pool.page_bytes

    def predicted_bytes(
        self,
        tokens: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        value_dim: int | None = None,
    ) -> int:
        """Of rows that share nothing."""
        width = head_dim + (head_dim if value_dim is None else value_dim)
        return batch * self._pages(tokens) * self.page * kv_heads * width * itemsize

    def tensors(self) -> Iterator[Tensor]:
        if self.pool.k is not None:
            yield from self.pool.pair

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Returns all keys and values, (B, H, seq_len, D) and (B, H, seq_len, Dv): a view of the
        pool where one row's pages lie side by side, else a copy, for one call of one layer."""
        if self.learning:
            raise Unsupported(
                "cache: pages have no gradients; valid are torch.no_grad(), or use_cache=False "
                "while training"
            )
        if self.pool.k is not None:
            rows = len(self.table), -1, -1, -1
            held = (x[:, 0].expand(*rows) for x in self.pool.pair)
            check_fits(*held, k, v)
        self._write(k, v)
        if self.total > k.shape[2]:
            k, v = self._read()
        return k, v, layout_of(padding_mask)

    def _write(self, k: Tensor, v: Tensor) -> None:
        """Puts new tokens behind those that are there."""
        rows, new, whole = k.shape[0], k.shape[2], self.total // self.page
        if self.total % self.page:
            self._alone([row[-1] for row in self.table], k, v)
        count = self._pages(self.total + new) - self._pages(self.total)
        # which pages of a row the row before has as well: those of a prompt that came many times
        same = [[False] * count] * rows if self.total else self._same(k, v, count)
        table = self.table or [[] for _ in range(rows)]
        taken = self.pool.take(sum(not one for row in same for one in row), k, v)[::-1]
        for index, (row, shared) in enumerate(zip(table, same, strict=True)):
            for one in shared:
                if one:
                    row.append(table[index - 1][len(row)])
                    self.pool.share(row[-1:])
                else:
                    row.append(taken.pop())
        self.table = table
        place = torch.arange(self.total, self.total + new)
        at = torch.tensor([row[whole:] for row in table], dtype=torch.int64).view(rows, -1)
        at = at[:, place // self.page - whole] * self.page + place % self.page
        # copies that the host does not wait for
        at = at.flatten().to(k.device, non_blocking=True)
        for held, x in zip(self.pool.pair, (k, v), strict=True):
            held.flatten(1, 2).index_copy_(1, at, x.transpose(0, 1).flatten(1, 2))
        self.total += new

    def _same(self, k: Tensor, v: Tensor, count: int) -> list[list[bool]]:
        """For each row and page of a first call, whether the row before has the same numbers."""
        same = torch.zeros(k.shape[0], count, dtype=torch.bool, device=k.device)
        if len(k) > 1:
            same[1:] = True
        for x in (k, v):
            alike = (x[1:] == x[:-1]).transpose(1, 2).flatten(2).all(dim=2)
            lacking = count * self.page - alike.shape[1]
            alike = torch.nn.functional.pad(alike, (0, lacking), value=True)
            same[1:] &= alike.view(-1, count, self.page).all(dim=2)
        return same.tolist()

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def _alone(self, last: list[int], k: Tensor, v: Tensor) -> None:
        """Copies the rows' last pages, which are to be written to, where others have them too."""
        for index, page in enumerate(last):
            if self.pool.users[page] == 1:
                continue
            (own,) = self.pool.take(1, k, v)
            for held in self.pool.pair:
                held[:, own] = held[:, page]
            self.pool.leave([page])
            self.table[index][-1] = own

    def _read(self) -> tuple[Tensor, Tensor]:
        """All keys and values, in order."""
        rows, pages, heads = len(self.table), self._pages(self.total), self.pool.k.shape[0]
        first = self.table[0][0] if rows == 1 else 0
        if rows == 1 and self.table[0] == [*range(first, first + pages)]:
            found = (x[:, first : first + pages].flatten(1, 2)[None] for x in self.pool.pair)
        else:
            at = torch.tensor(self.table, dtype=torch.int64).view(rows, 1, pages)
            at = (torch.arange(heads)[:, None] * len(self.pool.users) + at).flatten()
            at = at.to(self.pool.k.device, non_blocking=True)
            shape = rows, heads, pages * self.page, -1
            found = (x.flatten(0, 1).index_select(0, at).reshape(shape) for x in self.pool.pair)
        k, v = (x[:, :, : self.total] for x in found)
        return k, v

    # Changing what is held
    # ---------------------------------------------------------------------------------------------

    def _become(self, table: list[list[int]]) -> None:
        """Rows with these pages, which are the pool's already."""
        for row in table:
            self.pool.share(row)
        for row in self.table:
            self.pool.leave(row)
        self.table = table
        if len(self.pool.users) > 2 * self.pool.used + SPARE:
            self._compact()

    def _compact(self) -> None:
        """A pool without free pages."""
        kept = [page for page, users in enumerate(self.pool.users) if users]
        at = torch.tensor(kept, dtype=torch.int64, device=self.pool.k.device)
        place = {page: index for index, page in enumerate(kept)}
        small = Pool(self.page)
        small.k, small.v = (x.index_select(1, at) for x in self.pool.pair)
        small.users = [self.pool.users[page] for page in kept]
        self.table = [[place[page] for page in row] for row in self.table]
        self.pool = small

    def _select(self, index: Tensor) -> None:
        if self.pool.k is not None:
            self._become([list(self.table[row]) for row in index.tolist()])

    def _repeat(self, n: int) -> None:
        if self.pool.k is not None:
            self._become([list(row) for row in self.table for _ in range(n)])

    def _crop(self, n: int) -> None:
        pages = self._pages(n)
        self._become([row[:pages] for row in self.table])
        self.total = n

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        self.pool.map(how)

    def alone(self, row: int) -> State:
        one = self.shallow()
        assert isinstance(one, PagedState)
        at = torch.tensor(self.table[row], device=self.pool.k.device)
        one.pool = Pool(self.page)
        one.pool.k, one.pool.v = (x.index_select(1, at) for x in self.pool.pair)
        one.pool.users = [1] * len(at)
        one.table = [[*range(len(at))]]
        real = None if self.real is None else self.real[row : row + 1].sort(dim=1).values
        one.real, one.moved = real, False
        one.sizes = None if self.sizes is None else self.sizes._replace(batch=1)
        return one


@register
@dataclass(frozen=True)
class Paged(LayerCache):
    """Everything, in pages that rows share. page: tokens of one."""

    spec: str
    page: int = 16
    said: str = ""

    name = "paged"

    @classmethod
    def parse(cls, spec: str) -> Paged:
        _, options = parse_spec(spec)
        for option in options:
            check_choice("cache: paged: option", option, ("page",))
        page = options.get("page", cls.page)
        if type(page) is not int or not 1 <= page <= MOST:
            raise ValueError(
                f"cache {spec!r}: page: got {page!r}, valid is a whole number of 1 to {MOST} tokens"
            )
        return cls(spec, page)

    def refuses(self, backend: Holder, *, rotary: bool, device: torch.device) -> str | None:
        if type(backend.new_state()) is FullState:
            return None
        return (
            f"cache {self.spec!r} holds every key and value, and what {backend.name} remembers is "
            f"{backend.traits.state}; pages go with patterns that keep everything as it came, such "
            "as dense"
        )

    def hold(self, own: State, backend: Holder) -> PagedState:
        return PagedState(self.page)

    def bytes_per_token(self, heads: Heads) -> int | float:
        return full_bytes(heads)
