"""Structured projections: how hidden states become q, k, v and back with fewer parameters.

# q, k, v, o of every layer; ffn=True for the FFN too
effattn.swap(model, projections="lowrank(ratio=0.75)", calibration=tokens)
effattn.swap(model, projections="monarch(blocks=16)")
# how far each matrix is from the one it replaced
effattn.projections.errors(model)
# one linear layer by itself
MonarchLinear.from_linear(linear, blocks=16, rank=4)
"""

from __future__ import annotations

import importlib

_FUNCTIONS = {
    "LowRankLinear": "effattn.projections.lowrank",
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
