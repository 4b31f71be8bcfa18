"""The cache of a live model, layer by layer: what `swap(cache="int4(group=64, residual=128)")` asks
for.

A format (`effattn.quant.formats`) belongs to a layer's swap: its pattern's own cache, everything or
a ring, holds packed keys and values then. Layers that have no swapped pattern get "dense", which
computes what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from effattn.errors import check_choice
from effattn.hf.anatomy import Layer
from effattn.hf.placement import device_of
from effattn.interface import Backend
from effattn.specs import by_layer, parse_spec
from effattn.states.full import FullState, State

if TYPE_CHECKING:
    from effattn.quant.formats import Format

CACHES = ("full", "int8", "int4", "int2", "fp8")


@dataclass(frozen=True)
class LayerCache:
    """The format of one layer's cache. `spec`: as asked for; `said`: what is different about it in
    this layer.
    """

    spec: str
    format: Format
    said: str = ""

    def __str__(self) -> str:
        return f"{self.spec} ({self.said})" if self.said else self.spec

    def bytes_per_token(self, layer: Layer) -> int | float:
        """Of a packed token, scales and zeros included; exact."""
        exact = self.format.bytes_per_token(layer.kv_heads, layer.head_dim, layer.value_dim)
        return int(exact) if exact == int(exact) else exact

    def new_state(self, backend: Backend) -> State:
        """An empty state for `backend`, of the size of its own."""
        from effattn.quant.packed.ring import PackedRing
        from effattn.quant.packed.state import PackedState

        own = backend.new_state()
        if type(own) is FullState:
            state = PackedState(self.format)
        else:
            state = PackedRing(self.format, own.keep, first=backend.pattern(causal=True).first)
        state.owner = backend.signature
        return state


def parse(cache: str | dict[str | int, str], layers: int) -> dict[int, str]:
    """layer -> spec. ValueError for what means nothing, with the nearest valid name."""
    from effattn.quant.formats import Format

    asked = by_layer(cache, layers, "cache")
    for spec in dict.fromkeys(asked.values()):
        name, options = parse_spec(spec)
        check_choice("cache", name, CACHES)
        if name != "full":
            Format.parse(spec)
        elif options:
            raise ValueError(f"cache: got {spec!r}, full takes no options")
    return asked


def fit(layer: Layer, spec: str) -> LayerCache | None:
    """The format for this layer's heads; None for "full". ValueError, naming the layer, where it
    does not fit.
    """
    from effattn.quant.formats import Format

    if parse_spec(spec)[0] == "full":
        return None
    try:
        format, said = Format.parse(spec).fit(layer.head_dim, layer.value_dim)
    except ValueError as error:
        raise type(error)(f"layer {layer.index}: {error}") from error
    return LayerCache(spec, format, said)


def obstacle(layer: Layer, backend: Backend, cache: LayerCache) -> str | None:
    """Why this layer cannot have such a cache; None when nothing is known against it."""
    if not layer.causal:
        return f"cache {cache.spec!r}: an encoder remembers nothing"
    if not backend.packable:
        return (
            f"cache {cache.spec!r} holds packed keys and values, and what {backend.name} "
            "remembers is "
            f"{backend.traits.state}; packed caches go with dense, block and sliding without "
            "dilation"
        )
    if cache.format.pre_rope and not layer.family.rotary:
        return f"cache {cache.spec!r}: pre_rope=True, and the model has no rotary positions"
    if "fp8" in (cache.format.k.kind, cache.format.v.kind) and (
        lacking := no_fp8(device_of(layer.k.module))
    ):
        return f"cache {cache.spec!r}: {lacking}; valid there are int8, int4 and int2"
    return None


def no_fp8(device: torch.device) -> str:
    """Why there is no fp8 (e4m3) on this device; "" where there is."""
    if not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no float8_e4m3fn"
    if (
        device.type == "cuda"
        and torch.version.cuda
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        return (
            f"{torch.cuda.get_device_name(device)} has no fp8, which begins with compute "
            "capability 8.9"
        )
    return ""
