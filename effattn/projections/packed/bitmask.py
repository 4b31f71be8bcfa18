"""`BitmaskLinear`: a linear layer that keeps a bit for each weight, and the weights that are not
zero.

The format and its product are `effattn.kernels.bitmask`'s; `effattn.prune.pack(model,
format="bitmask")` puts these layers into a model."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.kernels import bitmask
from effattn.projections.packed.base import PackedWeight, register


@register("bitmask")
class BitmaskLinear(PackedWeight):
    """W with zeros anywhere, enough of them that it becomes smaller.

    values: parameter (nonzeros,)
    masks:  buffer (out_features, in_features / 8) uint8
    starts: buffer (out_features, in_features / 512, rounded up) int32"""

    kernel = bitmask
    SIZES = ("nonzeros",)
    FITS = "is smaller with a bitmask"
    MADE = "sparsity=0.5"
    masks: Tensor
    starts: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, nonzeros: int = 1, **more
    ):
        """A layer of zeros that has room for `nonzeros` weights. more: see `PackedWeight`.
        ValueError for a number of them that such a matrix cannot have."""
        if not 1 <= nonzeros <= in_features * out_features:
            raise ValueError(
                f"nonzeros: got {nonzeros:,}, valid for {out_features} x {in_features} weights is "
                f"1 to {in_features * out_features:,}"
            )
        self._room = nonzeros
        super().__init__(in_features, out_features, bias, **more)

    @classmethod
    def takes(cls, share, group):
        """Any that outweigh the bits: 1 of 16 in 16 bits, and the starts."""
        return share > 1 / 8

    def zeros(self, device, dtype):
        """A matrix of zeros. Its masks have no bits, whatever room there is for values."""
        rows, inputs = self.out_features, self.in_features
        return bitmask.Packed(
            torch.zeros(self._room, device=device, dtype=dtype),
            torch.zeros(rows, inputs // 8, dtype=torch.uint8, device=device),
            torch.zeros(rows, bitmask.segments(inputs), dtype=torch.int32, device=device),
        )

    @property
    def nonzeros(self) -> int:
        """How many weights are kept; 1 where all are zero."""
        return self.values.numel()

    def check(self) -> None:
        """ValueError where values, masks and starts do not fit together."""
        bitmask.check(self.packed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}"
