"""What a packed tensor is: `Coding` says how numbers become bits, `Codes` holds the bits of one K
or V cache, `Pages` of one that grew.

    codes = pack(k, Coding("int4", axis="channel", group=64))      # effattn.kernels.pack
    codes[128:256], codes.nbytes, codes.map(lambda x: x[beams])

Layout, for x (B, H, N, D), b bits and P = 8 / b planes:

    codes (B, H, N, D / P) uint8  byte c of a token holds channels c, c + D/P, c + 2D/P, ... from
                                  the lowest bits on: each plane is contiguous, so unpacking is a
                                  shift and a mask, and a kernel multiplies plane by plane without
                                  moving anything. Codes are signed, in two's complement: moved to
                                  a byte's top bits they are numbers around 0 as they are
    scale bf16, zero fp16         one for each group of `group` numbers:
      axis "channel"              (B, H, N / group, D): of one channel, along time (keys: their
                                  outliers are channels)
      axis "token"                (B, H, N, D / group): of one token, along the head dimension
                                  (values)

and what they mean, in fp32, is

    int8, int4, int2              (code + 1 / 2 + zero) scale, without zero when symmetric
    fp8                           e4m3(code) scale

Why this: the 2^b levels are the middles of 2^b equal cells that cover the group's range, so that no
number is further from its level than scale / 2, a step of (max - min) / 2^b (levels from minimum to
maximum would be (max - min) / (2^b - 1) apart: a third more at 2 bits). `scale` has bf16's
exponents, so neither large nor tiny numbers leave its range, and is rounded up; `zero`, the middle
of the range in steps, needs fp16's digits, and cannot overflow (see `reference.py`). Nothing is
shared between groups: what is stored is never quantized again, and a later outlier saturates
nothing. A group with an infinity or a NaN is not finite when unpacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effattn.kernels.errors import check_choice

KINDS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}  # bits
AXES = ("channel", "token")
LARGEST = 448.0  # of e4m3
SCALE, ZERO = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Coding:
    """How one tensor is packed. ValueError for names and numbers that are not valid."""

    kind: str = "int4"
    axis: str = "channel"
    group: int = 64
    symmetric: bool = False

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        check_choice("axis", self.axis, AXES)
        if type(self.group) is not int or self.group < 1:
            raise ValueError(f"group: got {self.group!r}, valid are whole numbers from 1 on")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return KINDS[self.kind]

    @property
    def planes(self) -> int:
        """Numbers in a byte."""
        return 8 // self.bits

    @property
    def half(self) -> int:
        """Codes are -half .. half - 1; not used by fp8."""
        return 2 ** (self.bits - 1)

    @property
    def has_zero(self) -> bool:
        """Whether groups have a zero point."""
        return self.kind != "fp8" and not self.symmetric

    @property
    def unit(self) -> int:
        """Only multiples of so many tokens can be packed, and cut apart."""
        return self.group if self.axis == "channel" else 1

    def scales(self, tokens: int, dim: int) -> tuple[int, int]:
        """The last two dimensions of `scale`."""
        return (
            (tokens // self.group, dim) if self.axis == "channel" else (tokens, dim // self.group)
        )

    def fits(self, dim: int) -> bool:
        """Whether heads of `dim` channels can be packed: whole bytes, whole groups, and no group
        astride planes.
        """
        if dim % self.planes:
            return False
        plane = dim // self.planes
        return self.axis == "channel" or (
            dim % self.group == 0 and not (self.group % plane and plane % self.group)
        )

    def bytes_per_token(self, dim: int) -> float:
        """Of one head, scales and zeros included; exact (a group is whole, so bytes may be shared
        between tokens).
        """
        return dim * self.bits / 8 + (4 if self.has_zero else 2) * dim / self.group

    def nbytes(self, tokens: int, dim: int) -> int:
        """Of one head with `tokens` tokens, a multiple of `unit`."""
        rows, columns = self.scales(tokens, dim)
        return tokens * dim * self.bits // 8 + (4 if self.has_zero else 2) * rows * columns

    def check(self, tokens: int, dim: int) -> None:
        """ValueError where `pack` could not take (..., tokens, dim); the message names what would
        fit.
        """
        if not self.fits(dim):
            if dim % self.planes:
                why = (
                    f"{self.planes} channels share a byte: valid head dimensions are multiples "
                    f"of {self.planes}"
                )
            else:
                why = f"valid groups are {', '.join(map(str, self.groups(dim)))}"
            raise ValueError(
                f"{self.kind} in groups of {self.group} per {self.axis}: got head dimension "
                f"{dim}; {why}"
            )
        if tokens % self.unit:
            raise ValueError(
                f"{self.kind} per channel: got {tokens} tokens, valid are multiples of {self.group}"
            )

    def groups(self, dim: int) -> list[int]:
        """The valid groups per token for heads of `dim` channels, which must be whole bytes."""
        return [
            g for g in range(1, dim + 1) if Coding(self.kind, "token", g, self.symmetric).fits(dim)
        ]


@dataclass
class Codes:
    """One packed tensor (B, H, N, D); see the top of this file for the layout. Tensors may be views
    with any strides but the last one's."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    coding: Coding

    @classmethod
    def empty(
        cls, coding: Coding, batch: int, heads: int, tokens: int, dim: int, device=None
    ) -> Codes:
        """Room for `tokens` tokens, a multiple of `coding.unit`; zeros, so that what is read by
        mistake is finite.
        """
        coding.check(tokens, dim)

        def room(last: tuple[int, int], dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, heads, *last, dtype=dtype, device=device)

        scales = coding.scales(tokens, dim)
        zero = room(scales, ZERO) if coding.has_zero else None
        return cls(
            room((tokens, dim // coding.planes), torch.uint8), room(scales, SCALE), zero, coding
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, D) of the tensor that was packed."""
        batch, heads, tokens, width = self.codes.shape
        return batch, heads, tokens, width * self.coding.planes

    @property
    def parts(self) -> list[Codes]:
        """As of `Pages`."""
        return [self]

    @property
    def tokens(self) -> int:
        """N."""
        return self.codes.shape[2]

    @property
    def dim(self) -> int:
        """D, before packing."""
        return self.codes.shape[3] * self.coding.planes

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes, scales and zeros included."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """codes, scale, and zero if there is one."""
        return (
            (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with `change` applied to each tensor: rows selected or repeated, another device,
        copies.
        """
        return Codes(
            change(self.codes),
            change(self.scale),
            None if self.zero is None else change(self.zero),
            self.coding,
        )

    def __getitem__(self, tokens: slice) -> Codes:
        """Tokens [start, stop), views. ValueError unless both are multiples of `coding.unit`."""
        start, stop, step = tokens.indices(self.tokens)
        unit = self.coding.unit
        if step != 1 or start % unit or (stop % unit and stop > start):
            raise ValueError(
                f"tokens: got [{start}:{stop}:{step}], valid are multiples of {unit}, in steps of 1"
            )
        length = max(0, stop - start)
        cut = (start // unit, length // unit) if self.coding.axis == "channel" else (start, length)
        return Codes(
            self.codes.narrow(2, start, length),
            self.scale.narrow(2, *cut),
            None if self.zero is None else self.zero.narrow(2, *cut),
            self.coding,
        )

    def take(self, tokens: Tensor) -> Codes:
        """Copies of single tokens, (B, H, n) int64 of them, each with scales of its own."""
        along = self.coding.axis == "channel"
        coding = replace(self.coding, group=1) if along else self.coding

        def gathered(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            at = tokens // self.coding.group if along and x is not self.codes else tokens
            return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3]))

        return Codes(*map(gathered, (self.codes, self.scale, self.zero)), coding)

    def put(self, first: int | Tensor, new: Codes) -> None:
        """Writes `new` in place over the tokens from number `first` on, a multiple of
        `coding.unit`, which a 0-d int64 tensor is not checked for."""
        if new.coding != self.coding or new.tokens > self.tokens:
            raise ValueError(
                f"put: {new.tokens} tokens of {new.coding} do not fit into {self.tokens} of "
                f"{self.coding}"
            )
        if isinstance(first, int):
            at = self[first : first + new.tokens]
            if at.tokens != new.tokens:
                raise ValueError(
                    f"put: {new.tokens} tokens from {first} on do not fit into {self.tokens}"
                )
            for held, x in zip(at.tensors(), new.tensors(), strict=True):
                held.copy_(x)
            return
        for held, x in zip(self.tensors(), new.tensors(), strict=True):
            step = self.coding.unit if held is not self.codes else 1
            held.index_copy_(2, first // step + torch.arange(x.shape[2], device=x.device), x)


@dataclass
class Pages:
    """Codes one after another along the tokens, each in memory of its own, all of one coding,
    batch, heads and head dimension. For plain torch only: a kernel reads one tensor."""

    parts: list[Codes]

    @property
    def coding(self) -> Coding:
        """The same for all parts."""
        return self.parts[0].coding

    @property
    def tokens(self) -> int:
        """N, of all parts."""
        return sum(part.tokens for part in self.parts)

    @property
    def dim(self) -> int:
        """D, before packing."""
        return self.parts[0].dim

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, D) of what is packed."""
        batch, heads, _, dim = self.parts[0].shape
        return batch, heads, self.tokens, dim

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, scales and zeros included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def scale(self) -> Tensor:
        """Of all parts, a copy."""
        return torch.cat([part.scale for part in self.parts], dim=2)

    @property
    def zero(self) -> Tensor | None:
        """Of all parts, a copy."""
        return (
            torch.cat([part.zero for part in self.parts], dim=2) if self.coding.has_zero else None
        )

    def __getitem__(self, tokens: slice) -> Pages:
        """Tokens [start, stop), views, as of `Codes`."""
        start, stop, step = tokens.indices(self.tokens)
        cut, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, part.tokens)
            if low < high:
                cut.append(
                    part if (low, high, step) == (0, part.tokens, 1) else part[low:high:step]
                )
            at += part.tokens
        return Pages(cut or [self.parts[0][:0]])


def concatenate(parts: list[Codes]) -> Codes:
    """One after another along the tokens; all of one coding, batch, heads and head dimension."""
    codings = {part.coding for part in parts}
    if len(codings) != 1:
        raise ValueError(f"concatenate: got {len(codings)} codings, valid is one")
    tensors = [
        torch.cat(each, dim=2) for each in zip(*(part.tensors() for part in parts), strict=True)
    ]
    return Codes(*tensors, *([None] if len(tensors) == 2 else []), parts[0].coding)
