"""The caches of a live model, layer by layer: what `swap(cache="int4(group=64, residual=128)")`
asks for.

What a spec means, `effattn.states.caches` knows. It belongs to a layer's swap; layers that have no
swapped pattern get "dense", which computes what they did."""

from __future__ import annotations

from effattn.hf.anatomy import Layer
from effattn.hf.placement import device_of
from effattn.interface import Backend
from effattn.specs import by_layer
from effattn.states import caches
from effattn.states.caches import LayerCache

# a spec, or a cache that was made of an object, for which there is none
Asked = str | LayerCache


def parse(cache: Asked | dict[str | int, Asked], layers: int) -> dict[int, Asked]:
    """layer -> what was asked for. ValueError for what means nothing, with the nearest valid
    name."""
    asked: dict[int, Asked] = by_layer(cache, layers, "cache")
    for one in dict.fromkeys(asked.values()):
        if not isinstance(one, LayerCache):
            caches.parse(one)
    return asked


def fit(layer: Layer, spec: Asked) -> LayerCache | None:
    """The cache for this layer's heads; None for "full". ValueError, naming the layer, where it
    does not fit.
    """
    try:
        cache = spec if isinstance(spec, LayerCache) else caches.parse(spec)
        return None if cache is None else cache.fit(layer)
    except ValueError as error:
        raise type(error)(f"layer {layer.index}: {error}") from error


def obstacle(layer: Layer, backend: Backend, cache: LayerCache) -> str | None:
    """Why this layer cannot have such a cache; None when nothing is known against it."""
    if not layer.causal:
        return f"cache {cache.spec!r}: an encoder remembers nothing"
    rotary, device = bool(layer.family.rotary), device_of(layer.k.module)
    return cache.refuses(backend, rotary=rotary, device=device)
