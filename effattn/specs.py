"""The grammar of every axis: what `swap`, `backend` and the command line read, and what checkpoints
hold.

    sliding(window=512, sinks=4)                a name, and its options with literal values
    yarn(factor=8)+rerope(window=256)           parts joined by "+" (positions)
    {"0-3": "dense", "4-": "block(block=64)"}   a spec for each layer

What the names mean is each axis' own (`effattn.axes`)."""

from __future__ import annotations

import ast
import copy
import keyword
import math
import re
from functools import lru_cache
from typing import NoReturn, TypeVar

Spec = TypeVar("Spec")  # a string, or what a caller made of one


def parse_spec(text: str) -> tuple[str, dict]:
    """`"sliding(window=512, sinks=4)"` -> ("sliding", {"window": 512, "sinks": 4}).

    Values are ints, floats, strings, bools, None, and lists and tuples of these. ValueError for
    anything else."""
    if not isinstance(text, str):
        raise ValueError(
            f"spec: got {type(text).__name__}, valid is a string such as 'dense' or "
            "'name(arg=value)'"
        )
    name, options = _parsed(text)
    return name, copy.deepcopy(options)  # which whoever asked may change


@lru_cache(maxsize=256)  # a model's layers have few specs, and each asks several times
def _parsed(text: str) -> tuple[str, dict]:
    """What `parse_spec` gives for a text."""

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"spec {text!r}: {why}; valid is name or name(arg=value, ...)") from None

    # Python's own grammar, of which only literals are evaluated: specs come from files of others
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
        if isinstance(item.value, ast.Name):  # shells take quotes away
            refuse(
                f"{item.arg} is not a literal value; text wants quotes, in a shell around all of "
                f'it too: "{_with_quotes(tree)}"'
            )
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


def _with_quotes(call: ast.Call) -> str:
    """The spec with quotes around bare words."""
    for item in call.keywords:
        if isinstance(item.value, ast.Name):
            item.value = ast.Constant(item.value.id)
    return ast.unparse(call)


def format_spec(name: str, options: dict) -> str:
    """The spec that `parse_spec` reads back as (name, options). ValueError for values that have no
    literal.
    """
    for word in (name, *options):
        if not (word.isascii() and word.isidentifier()) or keyword.iskeyword(word):
            raise ValueError(f"spec: {word!r} is not a plain ASCII identifier")
    # inf and nan have no literal in Python
    for option, value in options.items():
        if not _is_literal(value):
            raise ValueError(
                f"spec: {option}={value!r} is not a finite number, string, bool, None, list or "
                "tuple"
            )
    if not options:
        return name
    return f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})"


def split_parts(spec: str) -> list[str]:
    """The parts of "a(x=1)+b" as specs of their own, in order. What cannot be parsed is one part,
    which `parse_spec` will refuse with its own words."""
    # parsed, since a "+" may stand within an option's string
    try:
        tree = ast.parse(spec.strip(), mode="eval").body if isinstance(spec, str) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    found: list[str] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        found.append(ast.unparse(tree.right))
        tree = tree.left
    if tree is None or not found:
        return [spec]
    return [*reversed([*found, ast.unparse(tree)])]


def parse_layers(
    pattern: dict[str | int, Spec], layers: int, argument: str = "pattern"
) -> dict[int, Spec]:
    """{"0-3": a, "6-": b} -> {0: a, ..., 6: b, ...}. ValueError for overlaps and layers that do not
    exist.
    """
    if not pattern:
        raise ValueError(
            f'{argument}: got an empty dict, valid is for example {{"0-3": "dense", "4-": "dense"}}'
        )
    chosen: dict[int, Spec] = {}
    owner: dict[int, str | int] = {}
    for key, spec in pattern.items():
        for part in str(key).split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d+)?)?\s*", part)
            if not match:
                raise ValueError(
                    f'{argument}: got layers {key!r}, valid are "3", "0-3", "4-" and lists: "0-2,5"'
                )
            first = int(match[1])
            # "3", "0-3" or "4-", which ends with the model
            last = first if not match[2] else int(match[3]) if match[3] else layers - 1
            if first >= layers or last >= layers or last < first:
                raise ValueError(
                    f"{argument}: got layers {key!r}, the model has layers 0 to {layers - 1}"
                )
            for index in range(first, last + 1):
                if index in chosen:
                    raise ValueError(
                        f"{argument}: layer {index} is in both {owner[index]!r} and {key!r}"
                    )
                chosen[index], owner[index] = spec, key
    return dict(sorted(chosen.items()))


def by_layer(
    asked: Spec | dict[str | int, Spec], layers: int, argument: str = "pattern"
) -> dict[int, Spec]:
    """layer -> spec of one spec for all layers, or of a dict as for `parse_layers`."""
    if isinstance(asked, dict):
        return parse_layers(asked, layers, argument)
    return dict.fromkeys(range(layers), asked)


def _is_literal(value) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_literal, value))
    # exact types: a numpy number or a subclass would be written as something else
    return type(value) in (int, str, bool, type(None)) or (
        type(value) is float and math.isfinite(value)
    )
