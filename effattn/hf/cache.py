"""The cache that `generate()` uses by itself after a swap, made by hand."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache

from effattn.errors import Unsupported
from effattn.hf import anatomy, hooks, state_layer


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for one batch. Layers whose pattern remembers less than everything, or
    something else, have a `StateLayer`; the others have transformers' own. `generate` and
    `model(...)` make the same by themselves: a plain empty cache becomes this one at its first
    use."""
    parts = anatomy.of(model)
    if not parts.causal:
        raise Unsupported(f"{type(model).__name__} has no cache: it is not causal")
    cache = DynamicCache(config=model.config)
    for layer in parts.layers:
        swapped = getattr(layer.attention, hooks.ATTRIBUTE, None)
        if swapped is not None and swapped.backend is not None:
            state_layer.place(cache, swapped)
    return cache
