"""Structured projections: how hidden states become q, k, v and back with fewer parameters.

effattn.swap(model, projections="monarch(blocks=16)")  # q, k, v, o of every layer; ffn=True for the FFN too
effattn.projections.errors(model)                      # how far each matrix is from the one it replaced
MonarchLinear.from_linear(linear, blocks=16, rank=4)   # one linear layer by itself
"""

from __future__ import annotations

import importlib

_FUNCTIONS = {
    "MonarchLinear": "effattn.projections.monarch",
    "errors": "effattn.surgery.replace",
}

__all__ = sorted(_FUNCTIONS)


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )
