"""y = x W' + bias for a 2:4 sparse W: of every four weights in a row at most two are not zero, and
only those are kept.

    packed = pack(weight)                 # values and 2-bit positions: 9/16 of the bytes in 16 bits
    y = linear(x, packed, bias)

How the kept weights lie is in `packed`."""

from __future__ import annotations

from torch import Tensor

from ..flash import IMPLEMENTATIONS, choose
from .packed import Packed, pack, unpack

__all__ = ["FEW_ROWS", "IMPLEMENTATIONS", "Packed", "choose", "linear", "pack", "unpack"]

# of x, that the Triton kernel takes: more are a dense product, for which a block of W is unpacked
FEW_ROWS = 16


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x W' + bias. x (..., K), bias (N,), of the values' dtype and device; returns (..., N) in it,
    sums are fp32 (torch: as its matrix products do). The gradient is x's and the bias' only: packed
    weights do not train.

    impl: "auto", "torch", "triton" or "reference". Triton takes up to `FEW_ROWS` rows; "auto" takes
    torch for more. ValueError for sizes and dtypes that do not fit."""
    outputs, inputs = packed.shape
    if x.shape[-1] != inputs or x.dtype != packed.values.dtype:
        raise ValueError(
            f"x: expected (..., {inputs}) {packed.values.dtype} as the packed weight is, got "
            f"{tuple(x.shape)} {x.dtype}"
        )
    rows = x.reshape(-1, inputs)
    kind = choose(impl, x.device)
    if kind == "triton" and len(rows) > FEW_ROWS:
        if impl == "triton":
            raise ValueError(
                f"x: got {len(rows)} rows, valid for impl='triton' are at most {FEW_ROWS}"
            )
        kind = "torch"
    if kind == "triton":
        from .triton_impl import linear as run
    elif kind == "reference":
        from .reference import linear as run
    else:
        from .torch_impl import linear as run
    return run(rows, packed, bias).view(*x.shape[:-1], outputs)
