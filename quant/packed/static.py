"""A packed cache whose tensors never change their shapes: a decoding step compiles as one graph,
without a sync.

    cache = effattn.quant.cache(model, bits=4, max_length=4096)
    model(prompt, past_key_values=cache)                                 # as it is
    step = torch.compile(model, fullgraph=True)                          # then one token at a time

All room is allocated at the first call. Lengths are tensors. Every step writes its token into a
ring of the newest ones, and packs a group: the one that became due by it, or where none did, some
tokens into a place that nothing reads, so that no branch has to ask whether there is one.

B: rows; Hq, Hkv: query and key/value heads; T: new tokens; D, Dv: of a key, of a value; S: first
tokens in full precision; W: `size`, places of the ring; N: `room`, places for packed tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.interface import Call
from effattn.kernels.decode import packed
from effattn.kernels.decode.packed import PackedCache
from effattn.kernels.flash.pattern import Layout, Pattern, first_real
from effattn.kernels.merge import merge
from effattn.kernels.pack import Codes, pack
from effattn.quant.formats import Format
from effattn.quant.packed.new import New, among, check, neutral
from effattn.quant.rotation import hadamard
from effattn.states.sizes import check_fits
from effattn.states.static import Static


class StaticState(Static):
    """What `PackedState` holds, in room for `length` tokens: packed tokens number S on, a ring of
    the newest tokens, in which token t lies at t % size, and the first S tokens by position. For
    patterns that see everything."""

    evicts = False
    packed = True

    def __init__(self, format: Format, length: int):
        super().__init__(length)
        self.format = format
        flush = format.flush
        # the residual, up to one group that is not due yet, and the last one that was, so that
        # `crop` can go back behind it
        self.size = format.residual + 2 * flush
        # one group more, in which a step packs while none is due yet
        self.room = -(-max(0, length - format.first - format.residual) // flush) * flush + flush
        self.codes: tuple[Codes, Codes] | None = None
        self.rest: tuple[Tensor, Tensor] | None = None
        self.first_kv: tuple[Tensor, Tensor] | None = None

    def predicted_bytes(
        self, batch: int, kv_heads: int, head_dim: int, itemsize: int, value_dim: int | None = None
    ) -> int:
        """`nbytes` from the first call on, but for 8 bytes of length."""
        value_dim = value_dim or head_dim
        full = (self.size + self.format.first) * (head_dim + value_dim) * itemsize
        k, v = self.format.k.nbytes(self.room, head_dim), self.format.v.nbytes(self.room, value_dim)
        coded = k + v
        return batch * kv_heads * (full + coded)

    def tensors(self) -> Iterator[Tensor]:
        for codes in self.codes or ():
            yield from codes.tensors()
        yield from self.rest or ()
        yield from self.first_kv or ()

    # Attending
    # ----------------------------------------------------------------------------------------------

    def layout(self, padding_mask: Tensor | None = None) -> Layout:
        return Layout()

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Takes the new tokens in, and nobody attends. Returns them as they are held. Raises what
        `_new` does."""
        new = self._new(k, v, padding_mask)
        self._allocate(new)
        self._store(replace(new, begin=int(self.total)))
        return new.k, new.v, Layout()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `State.attend`. Unsupported for raw keys."""
        new = self._new(k, v, call.padding_mask)
        check(self.format, new, q, call, impl)
        if call.turn is not None:
            raise Unsupported(f"cache: {self.format}: pre_rope and max_length cannot be combined")
        self._allocate(new)
        q = hadamard(q) if "k" in self.format.rotate else q
        out, sums = (self._step if q.shape[2] == 1 else self._many)(new, q, pattern, call, impl)
        out = hadamard(out) if "v" in self.format.rotate else out
        return (out, sums) if lse else out

    def _new(self, k: Tensor, v: Tensor, padding_mask: Tensor | None) -> New:
        """The new tokens as they will be held, their number left open. Unsupported for gradients,
        ValueError for sizes that do not fit, and for more tokens than there is room for, where that
        can be known."""
        if self.learning or (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)):
            raise Unsupported(f"cache: {self.format} has no gradients; valid is torch.no_grad()")
        if self.rest is not None:
            check_fits(*self.rest, k, v)
        if (
            not torch.compiler.is_compiling()
            and (past := int(self.seq_len)) + k.shape[2] > self.length
        ):
            raise ValueError(
                f"cache: got {past} + {k.shape[2]} tokens, valid are at most "
                f"max_length={self.length}"
            )
        start = None if padding_mask is None else first_real(padding_mask)
        return New.of(self.format, k, v, 0, start, padding_mask)

    def _step(
        self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str
    ) -> tuple[Tensor, Tensor]:
        """One token: nothing here asks the device for a number."""
        # a copy: `total` is written in place, since a compiled step knows it by its address
        past = self.total.clone()
        for held, x in zip(self.rest, (new.k, new.v), strict=True):
            held.index_copy_(2, (past % self.size)[None], x)
        self._fill_first(new, past, past + 1)
        self.total.add_(1)
        out = self._read(
            q, self._cache(new, self.border(past), past + 1, past + 1), pattern, call, impl
        )
        # The group that became due by this token. Where none did, the spare room at the end takes
        # whatever the ring has, and nothing reads it: not the last group's place, since after a
        # crop the ring may not have its tokens any more.
        border, flush = self.border(past + 1), self.format.flush
        due = border - flush + torch.arange(flush, device=q.device)
        became = border > self.border(past)
        place = torch.where(became, border - flush - self.format.first, self.room - flush)
        for codes, held in zip(self.codes, self.rest, strict=True):
            group = neutral(
                held.index_select(2, due % self.size), codes.coding, due, new, self.format.first
            )
            codes.put(place, pack(group, codes.coding))
        return out

    def _many(
        self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str
    ) -> tuple[Tensor, Tensor]:
        """A prompt, or a part of one: its own tokens in full precision, and what is held."""
        past = int(self.total)
        new = replace(new, begin=past)
        out = among(new, new.k, q, pattern, call, impl)
        if past:
            held = self._cache(new, self.border(past), past, new.end)
            out = merge([out, self._read(q, held, pattern, call, impl)])
        self._store(new)
        return out

    def _store(self, new: New) -> None:
        """Holds new tokens: the newest in the ring, and packed what is due by now."""
        past, first = new.begin, self.format.first
        self._fill_first(new, past, new.end)
        low, high = self.border(past), self.border(new.end)
        oldest = max(0, past - self.size)  # that lies in the ring
        order = torch.arange(oldest, past, device=new.k.device) % self.size
        for held, x, codes in zip(self.rest, (new.k, new.v), self.codes, strict=True):
            # all tokens [oldest, end) in order: groups are cut from here, since a long prompt
            # passes through the ring without ever lying in it as a whole
            known = torch.cat([held.index_select(2, order), x], dim=2)
            if low < high:
                number = torch.arange(low, high, device=x.device)
                due = known[:, :, low - oldest : high - oldest]
                codes.put(
                    low - first, pack(neutral(due, codes.coding, number, new, first), codes.coding)
                )
            newest = torch.arange(max(oldest, new.end - self.size), new.end, device=x.device)
            held.index_copy_(2, newest % self.size, known[:, :, newest[0] - oldest :])
        self.total.fill_(new.end)

    def _read(
        self, q, cache: PackedCache, pattern: Pattern, call: Call, impl: str
    ) -> tuple[Tensor, Tensor]:
        return packed.attention(
            q,
            cache,
            pattern,
            scale=call.scale,
            softcap=call.softcap,
            q_first=call.q_first,
            turn=call.turn,
            bias=call.bias,
            impl=impl,
            lse=True,
        )

    def _cache(self, new: New, border, held, total) -> PackedCache:
        """Packed tokens below `border`, and the others below `held`, in full precision."""
        # Places without a token are -1, so that shapes do not depend on how many there are. The
        # ring has the newest `size` tokens below `held`: the newest number with number % size ==
        # place.
        device = new.k.device
        at = torch.arange(self.room, device=device) + self.format.first
        number = held - 1 - (held - 1 - torch.arange(self.size, device=device)) % self.size
        packed_numbers, rest_numbers = (
            torch.where(at < border, at, -1),
            torch.where(number >= border, number, -1),
        )
        count = self.format.first if isinstance(held, Tensor) else min(self.format.first, held)
        mask = None
        if new.mask is not None:
            number = torch.cat([packed_numbers, rest_numbers])
            width = new.mask.shape[1]
            mask = new.mask[:, number.clamp(0, width - 1)] & (number < width)
            first = torch.arange(count, device=device) + new.start[:, None]
            mask = torch.cat([first < held, mask], dim=1)
        first_kv = self.first_kv or (None, None)
        if count != self.format.first:
            first_kv = [x[:, :, :count] for x in first_kv]
        return PackedCache(
            *self.codes,
            *self.rest,
            torch.as_tensor(total, device=device),
            *first_kv,
            packed_numbers=packed_numbers,
            rest_numbers=rest_numbers,
            start=new.start,
            mask=mask,
        )

    def border(self, tokens):
        """As `PackedState.border`, of an int or a tensor."""
        first, flush = self.format.first, self.format.flush
        behind = tokens - first - self.format.residual
        behind = behind.clamp(min=0) if isinstance(behind, Tensor) else max(0, behind)
        return first + behind // flush * flush

    def _allocate(self, new: New) -> None:
        if self.codes is not None:
            return
        made = []
        for x, coding in ((new.k, self.format.k), (new.v, self.format.v)):
            rows = x.shape[:2]
            made.append(
                (
                    Codes.empty(coding, *rows, self.room, x.shape[3], x.device),
                    x.new_zeros(*rows, self.size, x.shape[3]),
                    x.new_zeros(*rows, self.format.first, x.shape[3]),
                )
            )
        self.codes, self.rest, first_kv = zip(*made, strict=True)
        self.first_kv = first_kv if self.format.first else None
        self.total = torch.zeros((), dtype=torch.int64, device=new.k.device)
        self.stay()

    def _fill_first(self, new: New, low, high) -> None:
        """Puts those of the new tokens, numbers [low, high), that are a row's first real ones to
        their positions; low and high may be 0-d tensors."""
        if self.first_kv is None:
            return
        number = torch.arange(self.format.first, device=new.k.device)[None]
        number = number if new.start is None else number + new.start[:, None]
        there = ((number >= low) & (number < high))[:, None, :, None]
        at = (number - low).clamp(0, new.k.shape[2] - 1)[:, None, :, None]
        for held, x in zip(self.first_kv, (new.k, new.v), strict=True):
            found = x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))
            held.copy_(torch.where(there, found, held))

    # Changing what is held
    # ---------------------------------------------------------------------------------------

    def _check_crop(self, n: int) -> None:
        total = int(self._seen())
        if self.border(n) < total - self.size:
            least = next(m for m in range(n, total + 1) if self.border(m) >= total - self.size)
            raise ValueError(
                f"crop: got {n}, but the tokens before are packed; valid are 0 and {least} to "
                f"{total}"
            )

    def _crop(self, n: int) -> None:
        self.total.fill_(n)

    def _release(self) -> None:
        self.codes = self.rest = self.first_kv = self.total = None
