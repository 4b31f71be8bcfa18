"""Backends by name or spec (`effattn.specs`).

backend("dense", impl="torch")  ==  backend("dense(impl='torch')")
"""

from __future__ import annotations

from effattn.axes import Axis
from effattn.interface import Backend
from effattn.specs import parse_spec

BACKENDS: Axis[Backend] = Axis("backend", "backend", "effattn.patterns")
register = BACKENDS.register


def backends() -> dict[str, type[Backend]]:
    """name -> class, of every backend in this version."""
    return BACKENDS.members()


def backend(spec: str, **options) -> Backend:
    """A new backend from its name or spec; `options` go to its class, and may not repeat those of
    the spec.

    Raises ValueError for unknown names and options, with the nearest valid one.
    """
    name, given = parse_spec(spec)
    if twice := sorted(given.keys() & options.keys()):
        raise ValueError(
            f"{spec!r}: {', '.join(twice)} given twice, in the spec and as an argument"
        )
    return BACKENDS.new(name, given | options)
