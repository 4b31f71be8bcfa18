"""Rules that turn positions into rotations and scores: what `swap(positions=...)` and a backend's
`rotary=` take.

    effattn.positions.rules()                                    # name -> class; fields are options
    rule = effattn.positions.rule("rerope(window=256)+logn", length=512, head_dim=64, heads=8)
    y = attn(q, k, v, rotary=rule)                               # q, k raw
"""

from __future__ import annotations

import importlib

from effattn.positions.rope import Rope

_FUNCTIONS = {
    "Positions": "effattn.positions.bound",
    "parse": "effattn.positions.registry",
    "rule": "effattn.positions.registry",
    "rules": "effattn.positions.registry",
}

__all__ = ["Positions", "Rope", "parse", "rule", "rules"]


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(
        f"module 'effattn.positions' has no attribute {name!r}; it has {', '.join(__all__)}"
    )
