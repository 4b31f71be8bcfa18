"""A call's new tokens on their way into a packed cache: checked, attended among themselves, cut
into what is packed and what is not.

B: rows; Hq, Hkv: query and key/value heads; T: new tokens; N: any tokens; D, Dv: of a key, of a
value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effattn.errors import Unsupported
from effattn.interface import Call
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.kernels.pack import Coding
from effattn.quant.formats import Format
from effattn.quant.rotation import hadamard


@dataclass(frozen=True)
class New:
    """A call's tokens as they are held, from number `begin` on. `start` and `mask` (of all tokens):
    as in `Layout`.
    """

    k: Tensor
    v: Tensor
    begin: int
    start: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        format: Format,
        k: Tensor,
        v: Tensor,
        begin: int,
        start: Tensor | None,
        mask: Tensor | None,
    ) -> New:
        """k (B, Hkv, T, D) and v (B, Hkv, T, Dv) as they came, rotated if the format says so."""
        k = hadamard(k) if "k" in format.rotate else k
        v = hadamard(v) if "v" in format.rotate else v
        return cls(k, v, begin, start, mask)

    @property
    def end(self) -> int:
        """Number of the first token after them."""
        return self.begin + self.k.shape[2]

    def cut(self, low: int, high: int) -> New:
        """Its tokens [low, high)."""
        if (low, high) == (0, self.k.shape[2]):
            return self
        return replace(
            self, k=self.k[:, :, low:high], v=self.v[:, :, low:high], begin=self.begin + low
        )


def check(format: Format, new: New, q: Tensor, call: Call, impl: str) -> None:
    """Raises for what cannot be computed with packed keys, before anything has changed."""
    where = f"cache: {format}"
    if q.shape[2] != new.k.shape[2]:
        raise ValueError(
            f"{where}: q: got {q.shape[2]} tokens, valid are as many as in k, {new.k.shape[2]}"
        )
    if impl == "reference":
        raise Unsupported(
            f"{where}: impl: got 'reference', valid with a packed cache are 'auto', 'torch' and "
            "'triton'"
        )
    if not call.causal:
        raise Unsupported(
            f"{where}: causal=False, valid is causal=True: what is remembered is the past"
        )
    if "k" in format.rotate and call.turn is not None:
        raise Unsupported(
            f"{where}: rotate='k' mixes a key's dimensions after its rotary turn, and here keys "
            "are kept before it; valid is rotate='v'"
        )


def among(
    new: New, k: Tensor, q: Tensor, pattern: Pattern, call: Call, impl: str, **far
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens over themselves. k: their keys as they are to be scored."""
    real = None if new.mask is None else new.mask[:, new.begin : new.end]
    layout = Layout(tail=new.begin, start=new.start, mask=real)
    return flash.attention(
        q,
        k,
        new.v,
        pattern,
        layout,
        causal=True,
        scale=call.scale,
        softcap=call.softcap,
        q_first=call.q_first,
        bias=call.bias,
        impl=impl,
        lse=True,
        **far,
    )


def neutral(x: Tensor, coding: Coding, number: Tensor, new: New, first: int) -> Tensor:
    """x (B, H, N, D), tokens of these numbers (N,), where those that are never read from there have
    a neighbour's values: padding, and the rows' first tokens, must not widen the range of a
    channel's group."""
    # a token's own group has no neighbours to harm, and without padding the first tokens lie
    # together
    if coding.axis == "token" or new.start is None:
        return x
    # any real token of the row will do: its values are in the group's range already
    there = number.clamp(0, new.mask.shape[1] - 1)
    read = (number - new.start[:, None] >= first) & new.mask[:, there] & (number == there)
    neighbour = read.int().argmax(dim=1)[:, None, None, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.where(read[:, None, :, None], x, x.gather(2, neighbour))


def cuts(
    sources: list[tuple[int, Tensor, Tensor]], low: int, high: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the keys, and of the values, of the tokens numbered [low, high), at least one
    each.
    """
    found = []
    for number, *pair in sources:
        a, b = max(low - number, 0), min(high - number, pair[0].shape[2])
        if a < b:
            found.append([x[:, :, a:b] for x in pair])
    found = found or [[x[:, :, :0] for x in sources[-1][1:]]]
    return tuple(map(list, zip(*found, strict=True)))
