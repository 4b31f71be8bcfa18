"""Patterns as `--pattern` gives them: a spec for all layers, or a dict (also as JSON) from layers
to specs.
"""

from __future__ import annotations

import json

from effattn import registry
from effattn.specs import format_spec, parse_spec

Pattern = str | dict[str, str]


def parse_pattern(pattern: Pattern) -> Pattern:
    """A spec in its normal form, or a dict from layers to such specs. ValueError with the nearest
    name or option.
    """
    if isinstance(pattern, str) and pattern.lstrip().startswith("{"):
        try:
            pattern = json.loads(pattern)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'pattern: {pattern!r} is not JSON ({error}), valid is for example {{"0-1": '
                f'"dense", "2-": "dense"}}'
            ) from None
    if isinstance(pattern, dict):
        return {str(layers): parse_pattern(_spec(layers, spec)) for layers, spec in pattern.items()}
    registry.backend(pattern)  # a backend that nobody keeps: it checks the name and the options
    return format_spec(*parse_spec(pattern))


def _spec(layers: str, spec) -> str:
    if not isinstance(spec, str) or spec.lstrip().startswith("{"):
        raise ValueError(
            f"pattern: layers {layers!r} have {spec!r}, valid is a spec such as 'dense'"
        )
    return spec


def label_of(pattern: Pattern) -> str:
    """A pattern as the report writes it."""
    if isinstance(pattern, str):
        return pattern
    return "; ".join(f"layers {layers}: {spec}" for layers, spec in pattern.items())


def without_sinks(pattern: Pattern) -> Pattern | None:
    """The same windows without their sinks; None where there are none."""
    if isinstance(pattern, dict):
        changed = {layers: without_sinks(spec) or spec for layers, spec in pattern.items()}
        return None if changed == pattern else changed
    name, options = parse_spec(pattern)
    if name != "sliding" or not options.pop("sinks", 0):
        return None
    return format_spec(name, options)
