"""y = x W' + bias for a W with zeros anywhere: a bit for each weight says whether it is kept. Half
of the weights take as many bytes as 2:4's do: 9/16 in 16 bits.

    packed = pack(weight)                 # values, masks, and where each part of a row begins
    y = linear(x, packed, bias)

How the kept weights lie is in `packed`."""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .packed import SEGMENT, Packed, check, pack, packed_bytes, segments, unpack

__all__ = [
    "IMPLEMENTATIONS",
    "SEGMENT",
    "Packed",
    "check",
    "choose",
    "linear",
    "pack",
    "packed_bytes",
    "segments",
    "unpack",
]


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x W' + bias. x (..., K), bias (N,), of the values' dtype and device; returns (..., N) in it,
    sums are fp32 (torch: as its matrix products do). The gradient is x's and the bias' only: packed
    weights do not train.

    impl: "auto", "torch", "triton" or "reference". Few rows are multiplied by the packed weights
    ("triton"), many by blocks of W that are unpacked and forgotten. ValueError for sizes and dtypes
    that do not fit."""
    outputs, inputs = packed.shape
    if x.shape[-1] != inputs or x.dtype != packed.values.dtype:
        raise ValueError(
            f"x: expected (..., {inputs}) {packed.values.dtype} as the packed weight is, got "
            f"{tuple(x.shape)} {x.dtype}"
        )
    rows = x.reshape(-1, inputs)
    kind = choose(impl, x.device)
    if kind == "triton":
        from .triton_impl import linear as run
    elif kind == "reference":
        from .reference import linear as run
    else:
        from .torch_impl import linear as run
    return run(rows, packed, bias).view(*x.shape[:-1], outputs)
