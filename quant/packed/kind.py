"""Packed keys and values as a kind of cache: "int4(group=64, residual=128)" in `swap(cache=...)`.

Its names are the formats of `effattn.quant.formats.FORMATS`, its options `Format.options`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.kernels.pack import Coding
from effattn.quant.formats import FORMATS, Format
from effattn.quant.packed.blocks import PackedBlocks
from effattn.quant.packed.ring import PackedRing
from effattn.quant.packed.state import PackedState
from effattn.quant.packed.static import StaticState
from effattn.quant.packed.static_ring import StaticPackedRing
from effattn.specs import parse_spec
from effattn.states.base import State
from effattn.states.blocks import BlockState
from effattn.states.caches import Heads, Holder, LayerCache, register
from effattn.states.full import RingState

OF_LATENTS = ("group", "symmetric")  # options that mean something where keys and values are latents


@register
@dataclass(frozen=True)
class Packed(LayerCache):
    """A pattern's own cache, everything or a ring, with packed keys and values in it."""

    spec: str
    format: Format
    said: str = ""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(FORMATS)

    @classmethod
    def parse(cls, spec: str) -> Packed:
        return cls(spec, Format.parse(spec))

    @property
    def raw_keys(self) -> bool:
        return self.format.pre_rope

    def fit(self, heads: Heads) -> Packed:
        return Packed(self.spec, *self.format.fit(heads.head_dim, heads.value_dim))

    def refuses(self, backend: Holder, *, rotary: bool, device: torch.device) -> str | None:
        own = backend.new_state()
        if not (backend.packable or isinstance(own, BlockState)):
            return (
                f"cache {self.spec!r} holds packed keys and values, and what {backend.name} "
                f"remembers is {backend.traits.state}; packed caches go with dense, block, topk "
                "and sliding without dilation"
            )
        if isinstance(own, BlockState) and self.raw_keys:
            return (
                f"cache {self.spec!r}: pre_rope=True, and {backend.name} chooses by keys as they "
                "were rotated; valid is pre_rope=False"
            )
        if isinstance(own, BlockState) and own.block > self.format.residual + 1:
            return (
                f"cache {self.spec!r}: residual={self.format.residual}, and {backend.name} "
                f"summarises blocks of {own.block} tokens before they are packed; valid is a "
                f"residual of at least {own.block - 1}"
            )
        if self.raw_keys and not rotary:
            return f"cache {self.spec!r}: pre_rope=True, and the model has no rotary positions"
        if lacking := self.format.lacking(device):
            return f"cache {self.spec!r}: {lacking}"
        return None

    def hold(self, own: State, backend: Holder) -> State:
        if isinstance(own, RingState):
            # the pattern knows its sinks, which a ring has in slots
            return PackedRing(self.format, own.keep, first=backend.pattern(causal=True).first)
        if isinstance(own, BlockState):
            return PackedBlocks(self.format, backend.rule, own.summarise)
        return PackedState(self.format)

    def static_state(self, length: int, backend: Holder | None = None) -> StaticState | None:
        own = None if backend is None else backend.new_state()
        if own is not None and (self.raw_keys or isinstance(own, BlockState)):
            return None
        if isinstance(own, RingState):
            first = backend.pattern(causal=True).first
            state = StaticPackedRing(self.format, length, own.keep, first=first)
        elif own is not None and own.evicts:
            return None
        else:
            state = StaticState(self.format, length)
        state.owner = None if backend is None else backend.signature
        return state

    def refuses_latents(self) -> str | None:
        _, given = parse_spec(self.spec)
        idle = [option for option in given if option not in OF_LATENTS]
        if not idle:
            return None
        return (
            f"cache {self.spec!r}: {idle[0]}: its keys and values are latents, which are packed "
            f"each token by itself; valid there are {' and '.join(OF_LATENTS)}"
        )

    def latent_coding(self, rank: int) -> Coding:
        return Format.parse(self.spec).fit(rank)[0].v

    def bytes_per_token(self, heads: Heads) -> int | float:
        """Of a packed token, scales and zeros included; exact."""
        exact = self.format.bytes_per_token(heads.kv_heads, heads.head_dim, heads.value_dim)
        return int(exact) if exact == int(exact) else exact
