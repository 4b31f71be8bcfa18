"""What a packed cache holds and how it changes: the memory of a `quant.packed.state.PackedState`.

Of n tokens, the `first` stay in full precision, and so do the newest, `residual` of them and up to
`flush` - 1 more; those between are packed, `flush` at a time, once and for all.

B: rows; Hkv: key/value heads; T: new tokens; D, Dv: of a key, of a value; S: first tokens; R: the
rest, in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.kernels.flash.pattern import Layout, first_real
from effattn.kernels.pack import Codes, concatenate, pack
from effattn.quant.formats import Format
from effattn.quant.packed.new import New, cuts, neutral
from effattn.states.base import State
from effattn.states.sizes import check_fits

TILE = 512  # tokens that are packed at once
PAGE = 2**21  # numbers of one packed tensor on a CPU: what a cache that grows has to copy at most
FEWEST = 2048  # tokens of one, whatever their size
LARGE_PAGE = 32768  # tokens of one on a GPU, where one launch should have work for all of it


class Held(State):
    """What is held, and how it changes. `format` fits the head dimension (`Format.fit`). `first`:
    keep so many first tokens if the format does not.

    Tokens are numbered from 0, padding included. Held are
        first_kv  (B, Hkv, S, D) and (.., Dv): each row's first real tokens, by position
        pages     packed, tokens number S to `stored`
        rest      (B, Hkv, R, D) and (.., Dv): tokens `begin` to `total` in full precision; begin =
                  stored, or less while tokens may be taken back, so that what was packed with them
                  can be packed again
    and no tensor has room for more. `format.nbytes` says in advance how many bytes that are, for
    rows without padding.
    """

    evicts = False
    packed = True

    def __init__(self, format: Format, first: int = 0):
        self.format = replace(format, first=max(first, format.first))
        self.reset()

    def _reset(self) -> None:
        self.pages: list[tuple[Codes, Codes]] = []
        self.rest: tuple[Tensor, Tensor] | None = None
        self.first_kv: tuple[Tensor, Tensor] | None = None
        self.total = self.stored = self.begin = 0
        self.pending = True  # whether some row waits for some of its first tokens
        self.candidates = 0  # so many tokens at the end of the next call may be taken back

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.format}, {self.total} tokens, {self.nbytes} bytes)"

    # What is held
    # ----------------------------------------------------------------------------------------------

    def _seen(self) -> int:
        return self.total

    def _bytes(self) -> int:
        """Bytes of memory that are allocated for it: whole storages, not what views show of
        them.
        """
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors()
        }
        return sum(storages.values())

    def predicted_bytes(
        self,
        tokens: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        value_dim: int | None = None,
    ) -> int:
        """`nbytes` after `tokens` tokens, exactly, unless some may be taken back still. value_dim:
        of values, head_dim by default."""
        return self.format.nbytes(tokens, kv_heads, head_dim, value_dim, itemsize, batch)

    def border(self, tokens: int) -> int:
        """The number of the first of `tokens` tokens that is not packed (but for the first
        ones).
        """
        first, packed, _ = self.format.held(tokens)
        return first + packed

    @property
    def device(self) -> torch.device | None:
        """Where it is; None while it holds nothing."""
        return None if self.rest is None else self.rest[0].device

    def tensors(self) -> Iterator[Tensor]:
        for pair in (self.rest, self.first_kv):
            yield from pair or ()
        for page in self.pages:
            for codes in page:
                yield from codes.tensors()

    def runs(self) -> Iterator[tuple[Codes, Codes, int | Tensor]]:
        """Packed keys and values, and the number of the first of these tokens, or all of their
        numbers (-1: none).
        """
        at = self.format.first
        for k, v in self.pages:
            yield k, v, at
            at += k.tokens

    # Taking tokens in
    # ---------------------------------------------------------------------------------

    def new(self, k: Tensor, v: Tensor, start: Tensor | None, padding_mask: Tensor | None) -> New:
        """The new tokens as they will be held. Raises Unsupported where gradients would flow
        through packed numbers, ValueError for sizes that do not fit; nothing has changed.
        """
        if self.learning or (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
            raise Unsupported(
                f"cache: {self.format} has no gradients; valid are torch.no_grad(), or "
                "use_cache=False while training"
            )
        if self.rest is not None:
            check_fits(*self.rest, k, v)
        return New.of(self.format, k, v, self.total, start, padding_mask)

    def layout(self, padding_mask: Tensor | None = None) -> Layout:
        if padding_mask is None:
            return Layout(tail=self.total)
        start, mask = first_real(padding_mask), padding_mask[:, self.total :]
        return Layout(tail=self.total, start=start, mask=mask)

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Takes the new tokens in, and nobody attends. Returns them as they are held, and where
        they lie. Raises what `new` does."""
        layout = self.layout(padding_mask)
        new = self.new(k, v, layout.start, padding_mask)
        # what may be taken back stays in full precision, beyond the residual if need be
        last = min(self.candidates, k.shape[2] - 1)
        if last:
            self.take(new)
            self.settle(new, self.border(new.end - last))
        else:
            self.absorb(new)
        self.candidates = 0
        return new.k, new.v, layout

    def take(self, new: New) -> None:
        """Holds a few new tokens in full precision, behind the others."""
        self._fill_first(new)
        sources, self.total = self._sources(new), new.end
        self.begin = min(self.begin, self.total)
        self._hold(sources, max(self.begin, min(self.format.first, self.total)))
        self.stored = max(self.stored, self.begin)

    def absorb(self, new: New) -> None:
        """Holds many new tokens: what is not among the newest afterwards is packed, a tile at a
        time.
        """
        self._fill_first(new)
        sources, self.total = self._sources(new), new.end
        border = self.border(self.total)
        self._pack(border, sources, new)
        self._hold(sources, border)

    def settle(self, new: New, floor: int) -> None:
        """Packs what is not among the newest any more; tokens from number `floor` on stay in full
        precision as well.
        """
        border, sources = self.border(self.total), [(self.begin, *self.rest)]
        if border > self.stored:
            self._pack(border, sources, new)
        if floor > self.begin:
            self._hold(sources, floor)

    def _sources(self, new: New) -> list[tuple[int, Tensor, Tensor]]:
        """Runs of tokens in full precision: the number of the first, keys and values."""
        return [*([(self.begin, *self.rest)] if self.rest else []), (new.begin, new.k, new.v)]

    def _hold(self, sources: list[tuple[int, Tensor, Tensor]], begin: int) -> None:
        """Makes the tokens from number `begin` on the rest, in memory of their own."""
        # `cat` copies even one part: a view would keep all of the call's keys in memory
        self.rest = tuple(torch.cat(parts, dim=2) for parts in cuts(sources, begin, self.total))
        self.begin = begin

    def _pack(self, border: int, sources: list[tuple[int, Tensor, Tensor]], new: New) -> None:
        for at, k, v in self._packed(border, sources, new):
            self._store(at, k, v)
            self.stored = at + k.tokens
        self.stored = max(self.stored, border)  # a ring packs only what it has places for

    def _packed(self, border: int, sources: list, new: New) -> Iterator[tuple[int, Codes, Codes]]:
        """The tokens below `border` that are not packed yet, tile by tile: the first one's number,
        keys and values.
        """
        # whole flushes, so that groups along time never reach over a tile's end
        tile = max(1, TILE // self.format.flush) * self.format.flush
        codings = self.format.k, self.format.v
        for at in range(self._worth_packing(border), border, tile):
            pair = cuts(sources, at, min(at + tile, border))
            pair = [parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in pair]
            number = torch.arange(at, at + pair[0].shape[2], device=new.k.device)
            first = self.format.first
            yield (
                at,
                *(
                    pack(neutral(x, c, number, new, first), c)
                    for x, c in zip(pair, codings, strict=True)
                ),
            )

    def _worth_packing(self, border: int) -> int:
        """The first token to pack, when all below `border` are to be."""
        return max(self.stored, self.format.first)

    def _store(self, at: int, k: Codes, v: Codes) -> None:
        """Keeps packed tokens, from number `at` on. Only the last page grows, one tensor after the
        other.
        """
        # A page grows by being copied. Small ones bound that copy; large ones let one launch read
        # much: on a GPU the second weighs more, on a CPU the first.
        page = LARGE_PAGE
        if k.device.type == "cpu":
            page = max(FEWEST, PAGE // (k.shape[0] * k.shape[1] * k.dim))
        if not self.pages or self.pages[-1][0].tokens + k.tokens > page:
            self.pages.append((k, v))
            return
        # popped first, so that the old keys' memory is free before the values are copied
        k_page, v_page = self.pages.pop()
        k_page = concatenate([k_page, k])
        self.pages.append((k_page, concatenate([v_page, v])))

    def _fill_first(self, new: New) -> None:
        """Puts those of the new tokens that are a row's first real ones to their positions."""
        low, high = new.begin, new.end
        if not self.format.first or not self.pending:
            return
        count = min(self.format.first, high)
        # (B or 1, count): the number of the token that stands at each first position of a row
        number = torch.arange(count, device=new.k.device)[None]
        number = number if new.start is None else number + new.start[:, None]
        there = ((number >= low) & (number < high))[:, None, :, None]
        at = (number - low).clamp(0, high - low - 1)[:, None, :, None]
        filled = []
        for held, x in zip(self.first_kv or (None, None), (new.k, new.v), strict=True):
            old = x.new_zeros(*x.shape[:2], count, x.shape[3])
            if held is not None:
                old[:, :, : held.shape[2]] = held
            filled.append(
                torch.where(there, x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3])), old)
            )
        self.first_kv = tuple(filled)
        late = 0
        if new.start is not None:
            late = int(new.start.max()) if self.late is None else self.late
        last = late + self.format.first
        # of all places, not only of those there are by now: a short prompt has few
        self.pending = high < last

    # Changing what is held
    # ---------------------------------------------------------------------------------------

    def _check_crop(self, n: int) -> None:
        least = self._least()
        if n < least:
            raise ValueError(
                f"crop: got {n}, but the tokens before number {least} are packed for good; valid "
                f"are 0 and {least} to {self.total} ({self.format} takes back what is in full "
                "precision)"
            )

    def _crop(self, n: int) -> None:
        # packed tokens go only where their full precision is still there (`begin` is before them)
        rest = tuple(x[:, :, : max(0, n - self.begin)].clone() for x in self.rest)
        first_kv = self.first_kv and tuple(x[:, :, :n].clone() for x in self.first_kv)
        stored = max(self.begin, min(self.stored, self.border(n)))
        self._rewind(n, min(stored, n), min(self.begin, n), rest, first_kv)

    def _least(self) -> int:
        """The fewest tokens but 0 that `crop` can go back to: any, while nothing is packed."""
        return self.begin if self.stored > self.format.first else 1

    def _rewind(self, total: int, stored: int, begin: int, rest, first_kv) -> None:
        self.total, self.begin, self.rest, self.first_kv, self.pending = (
            total,
            begin,
            rest,
            first_kv,
            True,
        )
        if stored < self.stored:
            self._unstore(stored)
        self.stored = stored

    def _unstore(self, stored: int) -> None:
        """Forgets packed tokens from number `stored` on."""
        end = self.stored
        while self.pages and end > stored:
            k, v = self.pages.pop()
            end -= k.tokens
            if end < stored:
                self.pages.append(tuple(codes[: stored - end].map(torch.clone) for codes in (k, v)))

    def _select(self, index: Tensor) -> None:
        if self.rest is not None:
            index = index.to(self.device)
            self._change(lambda x: x.index_select(0, index))

    def _repeat(self, n: int) -> None:
        self._change(lambda x: x.repeat_interleave(n, dim=0))

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Changes every tensor, page by page, so that one page at most is there twice. What `how`
        refuses, it refuses before anything has changed."""
        rest, first_kv = (pair and tuple(map(how, pair)) for pair in (self.rest, self.first_kv))
        self.rest, self.first_kv = rest, first_kv
        for index, page in enumerate(self.pages):
            self.pages[index] = tuple(codes.map(how) for codes in page)
