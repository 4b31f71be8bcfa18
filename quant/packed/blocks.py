"""A packed cache of a pattern that chooses blocks of keys: what "topk" holds with
`cache="int4(residual=128)"`.

Keys and values are packed as in `PackedState`, rotated, and each block's summary is made of its
keys before they are packed, and stays in full precision. The window and the sinks are read packed,
as of a sliding window. Of what a few queries chose, the tokens alone are unpacked; the queries of a
longer call need all of the layer's past unpacked, once.

B: rows; Hq, H: query and key/value heads; N: blocks; W: numbers of a summary; n: any tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from effattn.interface import Call
from effattn.kernels import topk
from effattn.kernels.flash.pattern import Pattern
from effattn.kernels.merge import merge
from effattn.kernels.pack import unpack
from effattn.quant.formats import Format
from effattn.quant.packed.new import New
from effattn.quant.packed.state import PackedState
from effattn.quant.rotation import hadamard
from effattn.states.blocks import Summarise


class PackedBlocks(PackedState):
    """`rule` says who reads which blocks, `summarise` is as of `effattn.states.blocks.BlockState`.

    `summaries` (B, H, N, W), float32 or better, of blocks that count from each row's first real
    token; those that a row has not finished hold nothing of meaning. Blocks have `residual` + 1
    tokens at most, so that none of a block's keys is packed before it is finished."""

    summaries: Tensor | None = None

    def __init__(self, format: Format, rule: topk.Rule, summarise: Summarise):
        super().__init__(format, first=rule.sinks)
        self.rule, self.summarise = rule, summarise

    def predicted_bytes(
        self,
        tokens: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        value_dim: int | None = None,
    ) -> int:
        """As of `Held`, with the summaries."""
        packed = super().predicted_bytes(tokens, batch, kv_heads, head_dim, itemsize, value_dim)
        numbers = batch * kv_heads * (tokens // self.rule.block) * self.rule.width(head_dim)
        return packed + numbers * max(4, itemsize)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As of `PackedState`; pattern: the window and the sinks."""
        before = self.summaries
        try:
            return super().attend(q, k, v, pattern, call, impl, lse)
        except BaseException:
            self.summaries = before
            raise

    def append(self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None):
        layout = self.layout(padding_mask)
        self._finish(self.new(k, v, layout.start, padding_mask))
        return super().append(k, v, padding_mask)

    def _few(self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool):
        chosen, at = self._choose(new, q)
        far = topk.attention_few(
            q,
            partial(self._read_tokens, new),
            self.rule,
            chosen,
            at,
            new.start,
            sinks=False,  # they are beside the window
            scale=call.scale,
            impl=impl,
        )
        return merge([super()._few(new, q, pattern, call, impl, True), far])

    def _many(self, new: New, q: Tensor, pattern: Pattern, call: Call, impl: str, need_lse: bool):
        chosen, at = self._choose(new, q)
        number = torch.arange(new.end, device=q.device)
        if new.start is not None:
            number = (number + new.start[:, None]).clamp(max=new.end - 1)
        k, v = self._read_tokens(new, number.expand(len(q), -1)[:, None])
        far = topk.attention(q, k, v, self.rule, chosen, at, scale=call.scale, impl=impl)
        return merge([super()._many(new, q, pattern, call, impl, True), far])

    def _choose(self, new: New, q: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of each query (B, H, T, n), and the queries' positions (1 or B, T); the blocks
        that the new tokens finish are summarised."""
        self._finish(new)
        at = torch.arange(new.begin, new.end, device=q.device)[None]
        if new.start is not None:
            at = torch.where(new.mask[:, new.begin : new.end], at - new.start[:, None], -1)
        return topk.select(self.rule, self._plain(q), self.summaries, at), at

    @torch.no_grad()
    def _finish(self, new: New) -> None:
        """Summarises the blocks that rows finish with the new tokens."""
        (batch, heads), device, size = new.k.shape[:2], new.k.device, self.rule.block
        start = torch.zeros(1, dtype=torch.int64, device=device) if new.start is None else new.start
        before, after = ((at - start).clamp(min=0) // size for at in (new.begin, new.end))
        most, count = (int(x.max()) for x in (after - before, after))
        if self.summaries is not None and not most:
            return
        block = before[:, None] + torch.arange(most, device=device)
        number = (start[:, None] + block * size)[..., None] + torch.arange(size, device=device)
        number = number.flatten(1).clamp(max=new.end - 1).expand(batch, -1)[:, None]
        # of keys that are not packed: an unfinished block is among the newest tokens
        found = self.summarise(self._plain(self._read_tokens(new, number, values=False)[0]))
        # rows that had more blocks than those that are left may be gone
        held = found[:, :, :0] if self.summaries is None else self.summaries[:, :, :count]
        grown = found.new_zeros(batch, heads, count + 1, found.shape[3])
        grown[:, :, : held.shape[2]] = held
        # what a row has not finished goes nowhere
        place = torch.where(block < after[:, None], block, count).expand(batch, -1)
        grown.scatter_(2, place[:, None, :, None].expand_as(found), found)
        self.summaries = grown[:, :, :count].clone()

    def _plain(self, x: Tensor) -> Tensor:
        """Queries or keys as they came, which the format may have mixed."""
        return hadamard(x) if "k" in self.format.rotate else x

    def _read_tokens(
        self, new: New, number: Tensor, values: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Keys (B, H, n, D) and values (B, H, n, Dv) of the tokens of these numbers, (B, H or 1, n)
        int64 below `new.end`, as attention reads them: packed, or in full precision."""
        number = number.expand(-1, new.k.shape[1], -1)
        found = []
        for place, own in enumerate((new.k, new.v) if values else (new.k,)):
            newest, begin = own, new.begin
            if self.rest is not None:
                newest, begin = torch.cat([self.rest[place], own], dim=2), self.begin
            x = _gathered(newest, (number - begin).clamp(0, newest.shape[2] - 1))
            for *pair, at in self.runs():
                there = (number >= at) & (number < at + pair[place].tokens)
                codes = pair[place].take((number - at).clamp(0, pair[place].tokens - 1))
                x = torch.where(there[..., None], unpack(codes, x.dtype, impl="torch"), x)
            if self.first_kv is not None:
                first = self.first_kv[place]
                position = number if new.start is None else number - new.start[:, None, None]
                there = (position >= 0) & (position < first.shape[2]) & (number < new.begin)
                x = torch.where(
                    there[..., None], _gathered(first, position.clamp(0, first.shape[2] - 1)), x
                )
            found.append(x)
        return found[0], found[1] if values else None

    # Changing what is held
    # ----------------------------------------------------------------------------------------------

    def tensors(self):
        yield from super().tensors()
        if self.summaries is not None:
            yield self.summaries

    def _least(self) -> int:
        # what is left of a block must be there in full precision, to be summarised once it is whole
        least = super()._least()
        return least if least == 1 else least + self.rule.block - 1

    def _crop(self, n: int) -> None:
        super()._crop(n)
        self.summaries = self.summaries[:, :, : n // self.rule.block].clone()

    def _reset(self) -> None:
        super()._reset()
        self.summaries = None

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        super()._change(how)
        self.summaries = None if self.summaries is None else how(self.summaries)


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """x (B, H, N, D) at places (B, H, n) -> (B, H, n, D)."""
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3]))
