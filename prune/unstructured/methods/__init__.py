"""One-shot methods, a file each: see `base` for what such a file says."""

from __future__ import annotations

import importlib
import pkgutil

from effattn.prune.unstructured.methods.base import Method, registered


def methods() -> dict[str, Method]:
    """name -> method, of every one in this version: those that need to know most of a layer's input
    first."""
    for file in pkgutil.iter_modules(__path__):  # they register themselves
        importlib.import_module(f"{__name__}.{file.name}")
    return dict(sorted(registered().items(), key=lambda item: (-item[1].needs, item[0])))
