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
    """name -> class, of every backend in this version, sorted by name.

    `cls.traits` says what each is: `.exact`, `.causal`, `.bidirectional`, `.learned` (bool) and
    `.state` (str)."""
    return BACKENDS.members()


def backend(spec: str, **options) -> Backend:
    """A new backend from its name or spec, an `nn.Module`: y = attn(q, k, v).

    `options` go to its class, and may not repeat those of the spec; `impl` is "auto", "torch",
    "triton" or "reference". Its call: q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) ->
    (B, Hq, Tq, Dv) in q's dtype (`Backend.forward`).

    Raises ValueError for unknown names and options, with the nearest valid one, and for values that
    mean nothing; Unsupported for an `impl` that the method does not have."""
    name, given = parse_spec(spec)
    if twice := sorted(given.keys() & options.keys()):
        raise ValueError(
            f"{spec!r}: {', '.join(twice)} given twice, in the spec and as an argument"
        )
    return BACKENDS.new(name, given | options)
