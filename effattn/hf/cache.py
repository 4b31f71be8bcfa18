"""The cache of a swapped model: `generate()` uses it by itself, `new_cache` makes one by hand.

`place` puts a `StateLayer` where a swapped layer needs one, at the first use of a cache."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from effattn.errors import Unsupported
from effattn.hf import anatomy, together
from effattn.hf.names import ATTRIBUTE
from effattn.hf.state_layer import FixedLayer, StateLayer, words_of
from effattn.hf.swapped_layer import SwappedLayer
from effattn.states.full import FullState

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
# on a Cache: how many of a call's last tokens may be taken back
CANDIDATES = "_effattn_candidates"
# assumed when a cache is told to record the past, and nothing says how far
UNKNOWN_CANDIDATES = 64


def new_cache(model: nn.Module, max_length: int | None = None) -> DynamicCache:
    """An empty cache for one batch. Layers whose pattern remembers less than everything, or
    something else, have a `StateLayer`; the others have transformers' own. `generate` and
    `model(...)` make the same by themselves: a plain empty cache becomes this one at its first
    use.

    max_length: tokens in all. A static cache then: all room is allocated at the first call, and a
    decoding step compiles as one graph (`torch.compile(model, fullgraph=True)`, CUDA graphs). All
    layers must be swapped. Raises Unsupported for what has no static form, ValueError for another
    number than a whole one of at least 1."""
    parts = anatomy.of(model)
    if not parts.causal:
        raise Unsupported(f"{type(model).__name__} has no cache: it is not causal")
    cache = DynamicCache(config=parts.model.config)
    held = [getattr(layer.attention, ATTRIBUTE, None) for layer in parts.layers]
    if max_length is not None:
        cache.layers = [_fixed(index, one, max_length) for index, one in enumerate(held)]
        return cache
    for swapped in held:
        if swapped is not None and swapped.backend is not None:
            place(cache, swapped)
    return cache


def _fixed(index: int, swapped: SwappedLayer | None, max_length: int) -> FixedLayer:
    """A layer of a static cache. Raises what `new_cache` does."""
    if swapped is None or swapped.backend is None:
        raise Unsupported(
            f"max_length: layer {index} is not swapped; valid is a model with a pattern in every "
            f'layer, such as effattn.swap(model, {{"{index}": "dense"}}) here'
        )
    if swapped.cache is None:
        state = swapped.backend.static_state(max_length)
    else:
        state = swapped.cache.static_state(max_length, swapped.backend)
    if state is None:
        raise Unsupported(
            f"max_length: layer {index}: {swapped.cache.spec!r} has no static form with "
            f"{swapped.pattern}; valid is a cache without max_length"
        )
    return FixedLayer(index, swapped.holds, state, swapped.cache, given=True)


def place(cache: Cache, swapped: SwappedLayer) -> None:
    """Sees to it that a swapped layer finds in `cache` what serves it; an empty plain layer is
    replaced.

    Raises Unsupported for what holds tokens that the layer cannot use, or in another format than it
    asks for."""
    index = swapped.index
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise Unsupported(
            f"past_key_values: got {type(cache).__name__}, valid is transformers' DynamicCache"
        )
    together.bind(cache)
    layers = cache.layers
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    if len(layers) <= index:
        raise Unsupported(
            f"past_key_values: it has {len(layers)} layers, layer {index} needs one too"
        )
    layer = layers[index]
    where = f"past_key_values: layer {index} ({words_of(swapped.holds, swapped.cache)})"
    empty = "start with an empty cache (effattn.new_cache(model))"
    # 1. One of ours: for this layer, and made for the same pattern, or empty and remade
    if isinstance(layer, StateLayer):
        if layer.index != index or sum(one is layer for one in layers) > 1:
            raise Unsupported(
                f"{where}: it was made for layer {layer.index}; each layer needs one of its own "
                f"({empty})"
            )
        if layer.pattern != swapped.holds or not (layer.given or layer.cache == swapped.cache):
            if layer.get_seq_length() or layer.given:
                filled = f"the cache was {'made for' if layer.given else 'filled by'} {layer.words}"
                raise Unsupported(f"{where}: {filled}; effattn.new_cache(model) is empty")
            layers[index] = new_layer(swapped, layer.record_past)
    # 2. transformers' own: an empty one is replaced where it would not do, one with tokens has to
    #    do
    elif isinstance(layer, StaticLayer):
        raise Unsupported(
            f"{where}: static cache: it has no place for a backend's own state; after a swap, use "
            "the default cache (effattn.new_cache(model))"
        )
    elif type(layer) in PLAIN and not layer.get_seq_length():
        new = new_layer(swapped, getattr(layer, "record_past", False))
        if type(new) is not type(layer):
            layers[index] = new
    elif swapped.cache is not None or swapped.latent is not None:
        held = "tokens in full precision" if swapped.latent is None else "keys and values"
        raise Unsupported(f"{where}: the {type(layer).__name__} holds {held}; {empty}")
    elif swapped.raw_keys:
        raise Unsupported(
            f"{where}: the {type(layer).__name__} holds rotated keys, and this pattern rotates "
            f"them itself, by their place in the cache; {empty}"
        )
    elif (
        isinstance(layer, DynamicSlidingWindowLayer) and swapped.own_window != layer.sliding_window
    ):
        raise Unsupported(
            f"{where}: the {type(layer).__name__} holds the last {layer.sliding_window} tokens "
            f"only; {empty}"
        )
    layer = layers[index]
    if isinstance(layer, StateLayer):
        layer.candidates = getattr(cache, CANDIDATES, 0) or (
            UNKNOWN_CANDIDATES if layer.record_past else 0
        )


def new_layer(swapped: SwappedLayer, record_past: bool = False) -> CacheLayerMixin:
    """transformers' own layer where it holds the same as a swapped layer's state, a `StateLayer`
    otherwise.
    """
    state = swapped.new_state()
    # all keys, rotated: transformers' own layer is as good, and what else reads a cache knows it
    if type(state) is FullState and not swapped.raw_keys:
        return DynamicLayer()
    layer = StateLayer(swapped.index, swapped.holds, state, swapped.cache)
    layer.record_past = record_past
    return layer
