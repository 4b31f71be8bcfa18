"""Pruning: single weights in one shot, whole heads, FFN dimensions and layers, and weights packed
without their zeros.

    report = effattn.prune.oneshot(model, tokens, method="sparsegpt", sparsity="2:4")     # in place

Every public name is imported at its first use.
"""

from __future__ import annotations

import importlib

_FUNCTIONS = {
    "Target": "effattn.prune.shearing.target",
    "oneshot": "effattn.prune.unstructured.one_shot",
    "pack": "effattn.prune.packed",
    "shear": "effattn.prune.shearing.sheared",
    "structured": "effattn.prune.structural.removal",
    "structured_files": "effattn.prune.structural.from_files",
}

__all__ = sorted(_FUNCTIONS)


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(
        f"module 'effattn.prune' has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return list(__all__)
