"""Backends by name, and their spec strings: `name` or `name(arg=value, ...)`, with literal values
only.

backend("dense", impl="torch")  ==  backend("dense(impl='torch')")
"""

from __future__ import annotations

import ast
import importlib
import inspect
import keyword
import math
from collections.abc import Callable

from effattn.errors import check_choice
from effattn.interface import Backend

_BACKENDS: dict[str, type[Backend]] = {}


def register(name: str) -> Callable[[type[Backend]], type[Backend]]:
    """Class decorator: makes a `Backend` known under `name`."""

    def add(cls: type[Backend]) -> type[Backend]:
        if name in _BACKENDS:
            raise ValueError(
                f"backend {name!r} is registered already, by {_BACKENDS[name].__qualname__}"
            )
        cls.name = name
        _BACKENDS[name] = cls
        return cls

    return add


def backends() -> dict[str, type[Backend]]:
    """name -> class, of every backend in this version."""
    importlib.import_module("effattn.patterns")  # its files register themselves
    return dict(_BACKENDS)


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
    cls = _find(name)
    options = given | options
    valid = inspect.signature(cls.__init__).parameters
    for option in options:
        check_choice(f"{name}: option", option, [p for p in valid if p != "self"])
    missing = [
        p.name
        for p in valid.values()
        if p.name != "self" and p.default is p.empty and p.name not in options
    ]
    if missing:
        raise ValueError(
            f"{name}: {', '.join(missing)} must be given, for example {name}({missing[0]}=...)"
        )
    return cls(**options)


def _find(name: str) -> type[Backend]:
    available = backends()
    if name in available:
        return available[name]
    check_choice("backend", name, available)


def parse_spec(text: str) -> tuple[str, dict]:
    """`"sliding(window=512, sinks=4)"` -> ("sliding", {"window": 512, "sinks": 4}).

    Values are ints, floats, strings, bools, None, and lists and tuples of these. ValueError for
    anything else."""
    if not isinstance(text, str):
        raise ValueError(
            f"spec: got {type(text).__name__}, valid is a string such as 'dense' or "
            "'name(arg=value)'"
        )

    def refuse(why: str):
        raise ValueError(f"spec {text!r}: {why}; valid is name or name(arg=value, ...)") from None

    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        refuse("cannot be parsed")
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        refuse("is not a name")
    if tree.args:
        refuse(f"{ast.unparse(tree.args[0])} has no name")
    options = {}
    for item in tree.keywords:
        if item.arg is None:
            refuse("** is not allowed")
        if item.arg in options:
            refuse(f"{item.arg} is given twice")
        try:
            options[item.arg] = ast.literal_eval(item.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            refuse(f"{item.arg} is not a literal value")
        if not _is_literal(options[item.arg]):
            refuse(
                f"{item.arg} is {type(options[item.arg]).__name__}, not a number, string, bool, "
                "None, list or tuple"
            )
    return tree.func.id, options


def format_spec(name: str, options: dict) -> str:
    """The spec that `parse_spec` reads back as (name, options). ValueError for values that have no
    literal.
    """
    for word in (name, *options):
        if not (word.isascii() and word.isidentifier()) or keyword.iskeyword(word):
            raise ValueError(f"spec: {word!r} is not a plain ASCII identifier")
    for option, value in options.items():
        if not _is_literal(value):
            raise ValueError(
                f"spec: {option}={value!r} is not a finite number, string, bool, None, list or "
                "tuple"
            )
    if not options:
        return name
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})"


def _is_literal(value) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    return type(value) in (int, str, bool, type(None)) or (
        type(value) is float and math.isfinite(value)
    )
