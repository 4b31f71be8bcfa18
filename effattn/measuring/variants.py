"""Variants of one model: how they are written, and how each is made without a second copy of the
weights.

name=sliding(window=512, sinks=4)                              a pattern, under a name of its own
sliding(window=512)                                            the same, named by its spec
pattern=sliding(window=512); heads=gqa(kv_heads=2)             several axes of `effattn.swap`
plain                                                          the model unchanged
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy, placement
from effattn.positions import registry as position_rules
from effattn.positions.base import spec_of
from effattn.specs import format_spec, parse_spec
from effattn.surgery import swapping
from effattn.swapping.patterns import Pattern, label_of, parse_pattern

AXES = ("pattern", "heads", "cache", "positions", "projections")
PLAIN = "plain"
UNCHANGED = (PLAIN, "dense")  # what "the model as transformers runs it" may be called
GRAMMAR = (
    "valid is name=spec, where spec is 'plain', a backend such as 'sliding(window=512)', or axes "
    "such as 'pattern=sliding(window=512); heads=gqa(kv_heads=2)'"
)


@dataclass(frozen=True)
class Variant:
    """One way to run the model: its name, and what `effattn.swap` is given. No axes: the model
    unchanged.

    `as_given`: the model as the caller swapped it, kept as it is.
    """

    name: str
    axes: dict[str, Pattern] = field(default_factory=dict)
    as_given: bool = False

    @property
    def spec(self) -> str:
        """The axes as text; what `parse` reads back."""
        if self.as_given:
            return "as given"
        return "; ".join(f"{axis}={label_of(spec)}" for axis, spec in self.axes.items()) or PLAIN

    def to_dict(self) -> dict:
        """For JSON."""
        return {"name": self.name, "spec": self.spec, "axes": self.axes}


def parse_all(given: Sequence[str] | Mapping[str, str] | str | None) -> list[Variant]:
    """The variants to measure; "plain" comes first unless one of them is the model unchanged.
    ValueError for what does not parse, for unknown backends and options, and for names given
    twice."""
    if given is None:
        return [Variant(PLAIN)]
    if isinstance(given, str):
        given = [given]
    pairs = given.items() if isinstance(given, Mapping) else map(split_name, given)
    found = [parse(name, spec) for name, spec in pairs]
    if all(variant.axes for variant in found):
        found.insert(0, Variant(PLAIN))
    names = [variant.name for variant in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"variant: {', '.join(twice)} given twice; each needs a name of its own, as in "
            "name=spec"
        )
    return found


def split_name(text: str) -> tuple[str, str]:
    """ "name=spec" -> (name, spec). A spec without a name, or whose name is an axis, is named by
    itself.
    """
    match = re.fullmatch(r"\s*([^=(){};]*[^=(){};\s])\s*=(.*)", text, flags=re.DOTALL)
    if match is None or match[1].strip() in AXES:
        return text.strip(), text
    return match[1].strip(), match[2]


def parse(name: str, spec: str) -> Variant:
    """One variant from its spec. ValueError that shows the variant, what is wrong, and the
    grammar.
    """
    text = spec.strip() if isinstance(spec, str) else spec
    try:
        if not isinstance(text, str) or not text or not name:
            raise ValueError(f"is {'empty' if text == '' or not name else type(text).__name__}")
        return Variant(name, {} if text in UNCHANGED else _axes(text))
    except Unsupported as error:  # well formed, but not in this version
        raise Unsupported(f"variant {name!r}: {error}") from None
    except ValueError as error:
        shown = f"variant {name!r}" if name == text else f"variant {name!r} = {spec!r}"
        raise ValueError(f"{shown}: {error}; {GRAMMAR}") from None


def _axes(text: str) -> dict[str, Pattern]:
    axes: dict[str, Pattern] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        match = re.fullmatch(r"(\w+)\s*=\s*(.*)", part, flags=re.DOTALL)
        axis, spec = (match[1], match[2]) if match else ("pattern", part)
        check_choice("axis", axis, AXES)
        if axis in axes:
            raise ValueError(f"{axis} is given twice")
        if axis == "pattern":
            axes[axis] = parse_pattern(spec)
        elif axis == "positions":
            axes[axis] = spec_of(position_rules.parse(spec))
        else:
            axes[axis] = format_spec(*parse_spec(spec))
    if not axes:
        raise ValueError("is empty")
    return axes


def build(model: nn.Module, variant: Variant) -> nn.Module:
    """A model that is `variant`, in eval mode. It shares `model`'s weights, which stay as they are;
    what a variant changes (attention weights, with fewer heads) is its own copy.

    Raises what `effattn.swap` raises.
    """
    parts = anatomy.of(model)
    changed = (
        {id(p) for p in _rewritten(parts)}
        if {"heads", "projections"} & variant.axes.keys()
        else set()
    )
    tensors = [*model.parameters(), *model.buffers(), *placement.maps(model)]
    twin = copy.deepcopy(model, {id(x): x for x in tensors if id(x) not in changed}).eval()
    if variant.as_given:
        return twin
    swapping.restore(twin)
    if variant.axes:
        axes = dict(variant.axes)
        if "heads" in axes:
            axes["heads"] = without_data(axes["heads"])
        swapping.swap(twin, axes.pop("pattern", None), **axes)
    return twin


def own_bytes(model: nn.Module, variant: Variant) -> int:
    """Bytes of weights that `build` copies."""
    if not {"heads", "projections"} & variant.axes.keys():
        return 0
    return sum(p.nbytes for p in _rewritten(anatomy.of(model)))


def _rewritten(parts: anatomy.Anatomy) -> list[nn.Parameter]:
    """The parameters that a conversion writes into, each once."""
    modules = [module for layer in parts for module in (layer.attention, layer.o.module)]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def without_data(heads: str) -> str:
    """A `heads` spec whose conversion needs no calibration: only speed is measured, which quality
    does not change.
    """
    name, options = parse_spec(heads)
    if name not in ("gqa", "mqa"):
        return heads
    return format_spec(name, {"method": "first", "refit": False} | options)
