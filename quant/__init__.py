"""Quantization: packed key/value caches, and weights.

    # then model.generate(ids)
    effattn.swap(model, cache="int4(group=64, residual=128)")
    # one cache by itself
    model.generate(ids, past_key_values=effattn.quant.cache(model, bits=4))

Every public name is imported at its first use.
"""

from __future__ import annotations

import importlib

_FUNCTIONS = {
    "Format": "effattn.quant.formats",
    "cache": "effattn.quant.packed.layer",
    "fold_values": "effattn.quant.rotation",
    "load_weights": "effattn.quant.weights",
    "quantize_weights": "effattn.quant.weights",
}

__all__ = sorted(_FUNCTIONS)


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(
        f"module 'effattn.quant' has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return list(__all__)
