"""Position rules by name, and their spec strings: parts joined by "+".

parse("rerope(window=256)+logn")                        # the parts, checked by themselves
rule("rerope(window=256)", length=512, head_dim=64)     # what `rotary=` of a backend call takes
"""

from __future__ import annotations

from effattn.errors import Unsupported
from effattn.positions.base import RULES, SLOTS, Part, Trained
from effattn.positions.bound import Positions
from effattn.specs import parse_spec, split_parts


def rules() -> dict[str, type[Part]]:
    """name -> class, of every position rule in this version, sorted by name.

    A class is a frozen dataclass whose fields are the options of its specs; its docstring says what
    it computes, and its source."""
    return RULES.members()


def parse(spec: str) -> tuple[Part, ...]:
    """The parts of "yarn(factor=8)+rerope(window=256)+logn", in the order of the slots.

    ValueError for unknown names and options, with the nearest valid one, for options that no model
    could have, and for two parts that decide the same."""
    parts: dict[str, Part] = {}
    for text in split_parts(spec):
        name, options = parse_spec(text)
        part = RULES.new(name, options)
        if part.slot in parts:
            raise ValueError(
                f"positions: {spec!r}: {parts[part.slot].name} and {name} decide the same; valid "
                "is one"
            )
        parts[part.slot] = part
    _refuse_meaningless(spec, parts)
    return tuple(parts[slot] for slot in SLOTS if slot in parts)


def rule(
    spec: str,
    *,
    length: int,
    head_dim: int,
    heads: int = 1,
    dims: int | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
) -> Positions:
    """A rule as `rotary=` of a backend's call takes it, for a model that was trained at `length`
    tokens.

    spec: as for `parse`. length: in tokens. heads: the query heads (what biases need). head_dim:
    the size of a head. dims: how many of its dimensions turn (None: all). base: b in the
    frequencies theta_i = b^(-2i/dims). interleaved: pairs are (2i, 2i + 1) instead of (i, i +
    dims/2). Returns a module that turns q (B, Hq, Tq, D) and k (B, Hkv, Tk, D), and learns what
    kerple and t5 learn.

    Raises ValueError for what means nothing, Unsupported for what cannot be combined."""
    dims = head_dim if dims is None else dims
    if dims % 2 or not 0 <= dims <= head_dim:
        raise ValueError(f"dims: got {dims}, valid is an even number up to head_dim={head_dim}")
    return Positions(parse(spec), Trained(length, heads, head_dim, dims, float(base), interleaved))


def _refuse_meaningless(spec: str, parts: dict[str, Part]) -> None:
    far, rotation, bias = parts.get("far"), parts.get("rotation"), parts.get("bias")
    if far is not None and bias is not None:
        raise Unsupported(
            f"positions: {spec!r}: {far.name} and {bias.name} both decide what far pairs see; "
            "valid is one of them"
        )
    if far is not None and rotation is not None and (rotation.varies or not rotation.by_distance):
        why = (
            "changes with the length"
            if rotation.varies
            else "is not a rotation by the distance alone"
        )
        raise Unsupported(
            f"positions: {spec!r}: {far.name} clips the distance of a rotation, and "
            f"{rotation.name} {why}"
        )
