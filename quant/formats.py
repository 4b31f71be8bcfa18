"""In which bytes a cache is kept: "int4(group=64, residual=128)" and what it costs.

format = Format.parse("int4(v=2, residual=64)")
# said: "values: groups of 32 channels instead of 64, ..."
format, said = format.fit(head_dim=32)
# of the packed tokens, scales included
format.bytes_per_token(kv_heads=8, head_dim=128)
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace

from effattn.errors import check_choice
from effattn.kernels.pack.codes import AXES, KINDS, Coding
from effattn.specs import format_spec, parse_spec

GROUPS = (16, 32, 64, 128, 256)
GROUP = {"int8": 128, "int4": 64, "int2": 32, "fp8": 128}  # by default
ROTATED = ("k", "v", "kv", True, False, None)


@dataclass(frozen=True)
class Format:
    """A cache of packed keys and values, and the tokens that stay in full precision.

    k, v: how each is packed; KIVI's way (arXiv:2402.02750) by default, keys per channel in groups
    along time, values per token in groups along the head dimension. residual: the newest tokens
    that stay in full precision at least: tokens are packed `flush` at a time, as soon as there are
    `residual + flush`. first: that many of each row's first tokens stay in full precision for ever
    (attention sinks). pre_rope: keys are kept before their rotation. rotate: "k", "v", "kv" or "":
    what a Hadamard matrix mixes before it is packed."""

    k: Coding
    v: Coding
    residual: int = 128
    first: int = 0
    pre_rope: bool = False
    rotate: str = ""
    spec: str = field(default="", compare=False)  # what `parse` made it of

    @classmethod
    def parse(cls, spec: str) -> Format:
        """ "int8", "int4", "int2" or "fp8", with any of the options of `options`. ValueError for
        anything else, with the nearest valid name or number."""
        name, given = parse_spec(spec)
        check_choice("cache", name, KINDS)
        valid = list(inspect.signature(cls.options).parameters)[1:]
        for option in given:
            check_choice(f"{name}: option", option, valid)
        return replace(cls.options(name, **given), spec=format_spec(name, given))

    @classmethod
    def options(
        cls,
        k: str,
        *,
        v: str | int | None = None,
        group: int | None = None,
        residual: int = 128,
        first: int = 0,
        k_axis: str = "channel",
        v_axis: str = "token",
        symmetric: bool | None = None,
        pre_rope: bool = False,
        rotate: str | bool | None = None,
    ) -> Format:
        """k: of the keys, "int8", "int4", "int2" or "fp8"; v: of the values, also as a number of
        bits (as the keys).

        group: 16 to 256, a power of two; by default 128 for int8 and fp8, 64 for int4 and 32 for
        int2. symmetric: no zero points (by default for int8 only; fp8 never has them)."""
        kinds = [
            check_choice("k", k, KINDS),
            check_choice(f"{k}: v", f"int{v}" if type(v) is int else v or k, KINDS),
        ]
        if group is not None and (type(group) is not int or group not in GROUPS):
            raise ValueError(
                f"{k}: group: got {group!r}{_nearest(group, GROUPS)}, valid are {_listed(GROUPS)}"
            )
        for option, number in (("residual", residual), ("first", first)):
            if type(number) is not int or number < 0:
                raise ValueError(
                    f"{k}: {option}: got {number!r}, valid are whole numbers of tokens from 0 on"
                )
        for option, flag in (("symmetric", symmetric), ("pre_rope", pre_rope)):
            if flag not in (True, False) and not (option == "symmetric" and flag is None):
                raise ValueError(f"{k}: {option}: got {flag!r}, valid are True and False")
        if rotate not in ROTATED:
            raise ValueError(
                f"{k}: rotate: got {rotate!r}, valid are 'k', 'v', 'kv' (or True) and None"
            )
        axes = (
            check_choice(f"{k}: k_axis", k_axis, AXES),
            check_choice(f"{k}: v_axis", v_axis, AXES),
        )
        codings = (
            Coding(
                kind,
                axis,
                group or GROUP[kind],
                kind == "fp8" or (kind == "int8" if symmetric is None else symmetric),
            )
            for kind, axis in zip(kinds, axes, strict=True)
        )
        rotate = "kv" if rotate is True else rotate or ""
        return cls(*codings, residual, first, bool(pre_rope), rotate)

    def __str__(self) -> str:
        return self.spec

    # Sizes
    # ----------------------------------------------------------------------------------------------

    @property
    def flush(self) -> int:
        """So many tokens are packed at a time: whole groups where a group is along time, and never
        only a few, since a cache that grows is copied in part."""
        return max(32, self.k.unit, self.v.unit)  # powers of two

    def fit(self, head_dim: int, value_dim: int | None = None) -> tuple[Format, str]:
        """This format for heads of that size, and what is different about it, "" if nothing is.

        Groups along the head dimension become the largest that fit in it. ValueError where the bits
        do not fit, with those that would."""
        found, said = {}, []
        for side, coding, dim in (("k", self.k, head_dim), ("v", self.v, value_dim or head_dim)):
            name = {"k": "keys", "v": "values"}[side]
            if dim % coding.planes:
                fitting = [kind for kind, bits in KINDS.items() if dim % (8 // bits) == 0]
                raise ValueError(
                    f"cache {coding.kind}, {name}: {coding.planes} numbers share a byte, which "
                    "does not fit head "
                    f"dimension {dim}; valid there are {_listed(fitting)}"
                )
            if not coding.fits(dim):
                fitting = coding.groups(dim)
                fair = [g for g in fitting if min(16, dim) <= g <= coding.group]
                group = fair[-1] if fair else next(g for g in fitting if g >= min(16, dim))
                said.append(
                    f"{name}: groups of {group} channels instead of {coding.group}, head "
                    f"dimension {dim}"
                )
                coding = replace(coding, group=group)
            found[side] = coding
        return replace(self, **found), "; ".join(said)

    def held(self, tokens: int) -> tuple[int, int, int]:
        """Of `tokens` tokens in a row without padding: how many are the first in full precision,
        packed, and the newest in full precision. The state keeps exactly so many."""
        first = min(self.first, tokens)
        packed = max(0, tokens - first - self.residual) // self.flush * self.flush
        return first, packed, tokens - first - packed

    def bytes_per_token(self, kv_heads: int, head_dim: int, value_dim: int | None = None) -> float:
        """Of a packed token in one layer, K and V, scales and zeros included; exact. The format
        must fit.
        """
        return kv_heads * (
            self.k.bytes_per_token(head_dim) + self.v.bytes_per_token(value_dim or head_dim)
        )

    def nbytes(
        self,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        itemsize: int = 2,
        batch: int = 1,
    ) -> int:
        """Of `tokens` tokens in one layer, K and V in all parts, as allocated; `itemsize` bytes a
        number in full precision. The format must fit."""
        value_dim = value_dim or head_dim
        first, packed, rest = self.held(tokens)
        full = (first + rest) * (head_dim + value_dim) * itemsize
        return (
            batch
            * kv_heads
            * (full + self.k.nbytes(packed, head_dim) + self.v.nbytes(packed, value_dim))
        )


def _nearest(got, valid) -> str:
    return (
        f" (nearest: {min(valid, key=lambda number: abs(number - got))})"
        if type(got) in (int, float)
        else ""
    )


def _listed(valid) -> str:
    return ", ".join(map(str, valid))
