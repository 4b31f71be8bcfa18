"""A cache of keys and values whose older tokens are packed: the `State` behind
`cache="int4(group=64, residual=128)"`.

    state = PackedState(Format.parse("int4").fit(128)[0])
    y = attn(q, k, v, state=state)                     # attn: dense, sliding or block

`quant.packed.held` says what is packed when; here it is read, without unpacking it. A call's own
tokens are seen in full precision and packed afterwards, as in KIVI; tokens that may be taken back
(`candidates`) are seen as if each had come in a call of its own, so that speculative decoding
computes what plain decoding does.

Up to 16 queries go to `effattn.kernels.decode.packed`, which reads packed bytes and full precision
in one launch. The queries of a longer call see their own tokens by `effattn.kernels.flash` and the
past by the packed kernel, and both are merged by log-sum-exp. A call needs memory for its own
tokens and for tiles, never for the cache.

B: rows; Hq, Hkv: query and key/value heads; T: new tokens; D, Dv: of a key, of a value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from effattn.interface import Call
from effattn.kernels import flash
from effattn.kernels.decode import MOST_QUERIES, packed
from effattn.kernels.decode.packed import PackedCache
from effattn.kernels.flash.pattern import Pattern
from effattn.kernels.flash.rules import Far
from effattn.kernels.merge import in_order, merge
from effattn.kernels.pack import Codes, Pages
from effattn.quant.packed.held import Held
from effattn.quant.packed.new import New, among, check
from effattn.quant.rotation import hadamard

# queries of a long call that are merged with what they see of the cache at once, on a CPU
BLOCK = 256


class PackedState(Held):
    """`format` fits the head dimension (`Format.fit`). `first`: keep so many first tokens if the
    format does not.
    """

    packed = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `State.attend`: the new tokens are taken in piece by piece, and each piece is read.
        With `call.turn`, keys are held raw."""
        new = self.new(k, v, call.layout.start, call.padding_mask)
        # tensors are replaced, not written to (a ring's places are: see `PackedRing._rewind`), so
        # that keeping the old ones undoes everything
        before = (self.total, self.stored, self.begin, self.rest, self.first_kv)
        try:
            out, sums = self._attend(new, q, pattern, call, impl, lse)
        except BaseException:
            self._rewind(*before)
            raise
        finally:
            self.candidates = 0
        return (out, sums) if lse else out

    def _attend(
        self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        check(self.format, new, q, call, impl)
        rotate, tokens = self.format.rotate, q.shape[2]
        last = min(self.candidates, tokens - 1)
        # the first token that has to stay in full precision if all `last` were taken back
        floor = self.border(new.end - last)
        q = hadamard(q) if "k" in rotate else q
        parts = []
        for low, high in self._pieces(new, last):
            run = self._few if high - low <= MOST_QUERIES else self._many
            some, own = new.cut(low, high), q[:, :, low:high]
            parts.append(run(some, own, pattern, _cut(call, low, high), impl, need_lse))
            self.settle(new, min(floor, self.border(self.total)))
        out, lse = in_order(parts)
        return (hadamard(out) if "v" in rotate else out), lse

    def _pieces(self, new: New, last: int) -> Iterator[tuple[int, int]]:
        """Runs of new tokens that see the same ones packed: all at once, but for the `last`, which
        come one by one.
        """
        tokens = new.k.shape[2]
        low = tokens - last
        yield 0, low
        while low < tokens:
            high, border = low + 1, self.border(new.begin + low)
            while (
                high < min(tokens, low + MOST_QUERIES) and self.border(new.begin + high) == border
            ):
                high += 1
            yield low, high
            low = high

    def _few(self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool):
        """Takes the tokens in, in full precision, and reads everything."""
        self.take(new)
        return self._read(new, q, self.total, pattern, call, impl, need_lse)

    def _many(self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool):
        """The new tokens among themselves and over what is held. Then they are taken in."""
        k, far = new.k, {}
        if call.turn is not None:
            at = torch.arange(new.begin, new.end, device=k.device)[None]
            at = (at if new.start is None else at - new.start[:, None]).clamp(min=0)
            # keys are held raw, and turned here to where they stand by the rule
            k = call.turn.keys(new.k, at)
            if call.turn.window is not None:
                far = {
                    "far": Far(
                        call.turn.q_far, call.turn.keys(new.k, at, far=True), call.turn.window
                    )
                }
        out = among(new, k, q, pattern, call, impl, **far)
        if new.begin:
            # On a CPU a block's scores over the cache stay in its caches, and the kernel skips what
            # a block's window cannot see. One launch does all of it on a GPU.
            block = q.shape[2] if flash.choose(impl, q.device) == "triton" else BLOCK
            for low in range(0, q.shape[2], block):
                high = min(low + block, q.shape[2])
                some = slice(None), slice(None), slice(low, high)
                seen = self._read(
                    new, q[some], new.begin + high, pattern, _cut(call, low, high), impl, True
                )
                out[0][some], out[1][some] = merge([(out[0][some], out[1][some]), seen])
        self.absorb(new)
        return out

    def _read(
        self,
        new: New,
        q: Tensor,
        total: int,
        pattern: Pattern,
        call: Call,
        impl: str,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of q, the last of `total` tokens, over what the state holds."""
        caches = list(self._caches(new, total, together=flash.choose(impl, q.device) == "torch"))
        parts = []
        for cache in caches:
            # the first tokens lie beside one page only: with the others, nothing is a sink
            first = min(pattern.first, cache.slots)
            part = packed.attention(
                q,
                cache,
                replace(pattern, first=first),
                causal=True,
                scale=call.scale,
                softcap=call.softcap,
                q_first=call.q_first if first else None,
                turn=call.turn,
                bias=call.bias,
                impl=impl,
                lse=need_lse or len(caches) > 1,
            )
            parts.append(part if isinstance(part, tuple) else (part, None))
        return parts[0] if len(parts) == 1 else merge(parts)

    def _caches(self, new: New, total: int, together: bool) -> Iterator[PackedCache]:
        """What is held: all pages together, or page by page, the first tokens beside the first, the
        rest beside the last."""
        rest = [x[:, :, self.stored - self.begin :] for x in self.rest]
        runs = list(self.runs()) or [(*self._nothing(), self.format.first)]
        if together and len(runs) > 1:
            runs = [(Pages([k for k, _, _ in runs]), Pages([v for _, v, _ in runs]), runs[0][2])]
        for index, (k, v, where) in enumerate(runs):
            is_first, is_last = index == 0, index == len(runs) - 1
            numbers = where if isinstance(where, Tensor) else None
            k_rest, v_rest = rest if is_last else [x[:, :, :0] for x in rest]
            k_first, v_first = self.first_kv if is_first and self.first_kv else (None, None)
            mask = None
            if new.mask is not None:
                mask = self._mask(
                    new,
                    0 if k_first is None else k_first.shape[2],
                    where,
                    k.tokens,
                    k_rest.shape[2],
                )
            newest = total == self.total and is_last
            yield PackedCache(
                k,
                v,
                k_rest,
                v_rest,
                total,
                k_first,
                v_first,
                packed_from=0 if numbers is not None else where,
                packed_numbers=numbers,
                start=new.start,
                mask=mask,
                rest_numbers=None
                if newest
                else torch.arange(self.stored, self.stored + k_rest.shape[2], device=k.device),
            )

    def _mask(self, new: New, count: int, where: int | Tensor, tokens: int, rest: int) -> Tensor:
        """(B, count + tokens + rest) bool: which of one `PackedCache`'s keys are real, there, and
        held nowhere else. count: of the first tokens in full precision that are beside it; where:
        as in `runs`.
        """
        device, start = new.k.device, new.start[:, None]
        if isinstance(where, Tensor):
            number, real = where, new.mask[:, where.clamp(min=0)]
        else:
            number, real = (
                torch.arange(where, where + tokens, device=device),
                new.mask[:, where : where + tokens],
            )
        newest = torch.arange(self.stored, self.stored + rest, device=device)
        number = torch.cat([number, newest])
        real = torch.cat([real, new.mask[:, self.stored : self.stored + rest]], dim=1)
        # the kernel skips those only where it is given the first tokens
        if self.first_kv and not count:
            real = real & (number - start >= self.format.first)
        there = start + torch.arange(count, device=device) < self.total
        return torch.cat([there, real], dim=1)

    def _nothing(self) -> tuple[Codes, Codes]:
        """Packed keys and values of no tokens."""
        codings = (self.format.k, self.format.v)
        return tuple(
            Codes.empty(coding, *x.shape[:2], 0, x.shape[3], x.device)
            for coding, x in zip(codings, self.rest, strict=True)
        )


def _cut(call: Call, low: int, high: int) -> Call:
    """The call of its queries [low, high)."""
    turn, q_first = call.turn, call.q_first
    if turn is not None and turn.q_far is not None:
        turn = replace(turn, q_far=turn.q_far[:, :, low:high])
    return replace(call, turn=turn, q_first=None if q_first is None else q_first[:, :, low:high])
