"""Packed weights: linear layers that keep a weight with zeros without them, exactly.

A format is one file of this package: a subclass of `PackedWeight` that registers itself under its
name. `effattn.prune.pack(model, format="bitmask")` puts such layers into a model."""

from __future__ import annotations

from effattn.projections.packed.base import (
    FORMATS,
    PackedWeight,
    check,
    check_recorded,
    layers_of,
    rebuild,
    record,
    register,
)
from effattn.projections.packed.bitmask import BitmaskLinear
from effattn.projections.packed.sparse24 import LARGE, PackedLinear

__all__ = [
    "FORMATS",
    "LARGE",
    "BitmaskLinear",
    "PackedLinear",
    "PackedWeight",
    "check",
    "check_recorded",
    "layers_of",
    "rebuild",
    "record",
    "register",
]
