"""In which bytes a cache is kept: "int4(group=64, residual=128)" and what it costs.

format = Format.parse("int4(v=2, residual=64)")
# said: "values: groups of 32 channels instead of 64, ..."
format, said = format.fit(head_dim=32)
# of the packed tokens, scales included
format.bytes_per_token(kv_heads=8, head_dim=128)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from effattn.errors import check_choice
from effattn.kernels.pack.codes import AXES, Coding
from effattn.specs import format_spec, parse_spec

GROUPS = (16, 32, 64, 128, 256)
ROTATED = ("k", "v", "kv", True, False, None)


def no_fp8(device: torch.device) -> str:
    """Why there is no fp8 (e4m3) on this device; "" where there is."""
    if not hasattr(torch, "float8_e4m3fn"):
        return f"torch {torch.__version__} has no float8_e4m3fn"
    if (
        device.type == "cuda"
        and torch.version.cuda
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        return (
            f"{torch.cuda.get_device_name(device)} has no fp8, which begins with compute "
            "capability 8.9"
        )
    return ""


@dataclass(frozen=True)
class Numbers:
    """How a format writes numbers, unless its spec says otherwise.

    coding: what the kernels call it (`effattn.kernels.pack.KINDS`). group: numbers that share a
    scale. symmetric: without zero points. zeros: whether it can have zero points at all. bits: the
    number that stands for it in `v=4` and `cache(bits=4)`. first: tokens at a row's start that stay
    in full precision. lacking: why a device cannot have it, "" where it can."""

    coding: str
    group: int
    symmetric: bool = False
    zeros: bool = True
    bits: int | None = None
    first: int = 0
    lacking: Callable[[torch.device], str] = lambda device: ""


# Every format by name. A new one is an entry here, where the kernels know its coding, and a row in
# the tests.
FORMATS = {
    "int8": Numbers("int8", group=128, symmetric=True, bits=8),
    "int4": Numbers("int4", group=64, bits=4, first=4),
    "int2": Numbers("int2", group=32, bits=2, first=4),
    "fp8": Numbers("fp8", group=128, symmetric=True, zeros=False, lacking=no_fp8),
}
BITS = {numbers.bits: name for name, numbers in FORMATS.items() if numbers.bits}


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
        """One of `FORMATS` ("int8", "int4", "int2", "fp8"), with any of the options of `options`.
        ValueError for anything else, with the nearest valid name or number."""
        if not isinstance(spec, str):
            parse_spec(spec)  # says what it got
        return _parsed(spec)

    @classmethod
    def options(
        cls,
        k: str,
        *,
        v: str | int | None = None,
        group: int | None = None,
        residual: int = 128,
        first: int | None = None,
        k_axis: str = "channel",
        v_axis: str = "token",
        symmetric: bool | None = None,
        pre_rope: bool = False,
        rotate: str | bool | None = None,
    ) -> Format:
        """k: of the keys, one of `FORMATS`; v: of the values, or a number of bits (as the keys).

        group: 16 to 256, a power of two; by default 128 for int8 and fp8, 64 for int4 and 32 for
        int2. first: by default 4 for int4 and int2, whose few levels a model's attention sinks
        would take for themselves, and 0 for the others. symmetric: no zero points (by default for
        int8 only; fp8 never has them)."""
        kinds = [
            check_choice("k", k, FORMATS),
            check_choice(f"{k}: v", f"int{v}" if type(v) is int else v or k, FORMATS),
        ]
        if group is not None and (type(group) is not int or group not in GROUPS):
            raise ValueError(
                f"{k}: group: got {group!r}{_nearest(group, GROUPS)}, valid are {_listed(GROUPS)}"
            )
        first = FORMATS[k].first if first is None else first
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
        codings = []
        for kind, axis in zip(kinds, axes, strict=True):
            numbers = FORMATS[kind]
            plain = numbers.symmetric if symmetric is None else symmetric
            size = group or numbers.group
            codings.append(Coding(numbers.coding, axis, size, plain or not numbers.zeros))
        rotate = "kv" if rotate is True else rotate or ""
        keys, values = codings
        return cls(keys, values, residual, first, bool(pre_rope), rotate)

    def __str__(self) -> str:
        return self.spec

    # Sizes
    # ----------------------------------------------------------------------------------------------

    @property
    def flush(self) -> int:
        """So many tokens are packed at a time: whole groups where a group is along time, and never
        only a few, since a cache that grows is copied in part."""
        return max(32, self.k.unit, self.v.unit)  # powers of two: the largest is a multiple of all

    def fit(self, head_dim: int, value_dim: int | None = None) -> tuple[Format, str]:
        """This format for heads of that size (value_dim: of values, head_dim by default), and what
        is different about it in words, "" if nothing is.

        Groups along the head dimension become the largest that fit in it. ValueError where the bits
        do not fit, with those that would."""
        # formats are equal whose specs are not, and each keeps its own
        return _fitted(self, self.spec, head_dim, value_dim or head_dim)

    def lacking(self, device: torch.device) -> str:
        """Why there are no such numbers on this device, and which there are; "" if there are."""
        for coding in (self.k, self.v):
            if why := FORMATS[coding.kind].lacking(device):
                *most, last = [name for name, one in FORMATS.items() if not one.lacking(device)]
                return f"{why}; valid there are {', '.join(most)} and {last}"
        return ""

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


@lru_cache(maxsize=64)  # every layer of a model asks, when it is loaded
def _parsed(spec: str) -> Format:
    """`Format.parse`."""
    name, given = parse_spec(spec)
    check_choice("cache", name, FORMATS)
    valid = list(inspect.signature(Format.options).parameters)[1:]
    for option in given:
        check_choice(f"{name}: option", option, valid)
    return replace(Format.options(name, **given), spec=format_spec(name, given))


@lru_cache(maxsize=64)
def _fitted(format: Format, spec: str, head_dim: int, value_dim: int) -> tuple[Format, str]:
    """`Format.fit`. spec: the format's."""
    found, said = {}, []
    for which, coding, dim in (("k", format.k, head_dim), ("v", format.v, value_dim)):
        name = {"k": "keys", "v": "values"}[which]
        if dim % coding.planes:
            fitting = [
                kind
                for kind, numbers in FORMATS.items()
                if dim % Coding(numbers.coding).planes == 0
            ]
            raise ValueError(
                f"cache {coding.kind}, {name}: {coding.planes} numbers share a byte, which "
                f"does not fit head dimension {dim}; valid there are {_listed(fitting)}"
            )
        # the largest group that divides the head dimension, but none below 16 numbers if there
        # is a larger one: a scale and a zero for so few cost as much as the numbers
        if not coding.fits(dim):
            fitting = coding.groups(dim)
            fair = [g for g in fitting if min(16, dim) <= g <= coding.group]
            group = fair[-1] if fair else next(g for g in fitting if g >= min(16, dim))
            said.append(
                f"{name}: groups of {group} channels instead of {coding.group}, head "
                f"dimension {dim}"
            )
            coding = replace(coding, group=group)
        found[which] = coding
    return replace(format, **found), "; ".join(said)
