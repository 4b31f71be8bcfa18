"""`PackedLinear`: a linear layer whose 2:4 sparse weight is kept without its zeros.

The format and its product are `effattn.kernels.sparse24`'s; `effattn.prune.pack` puts these layers
into a model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_product

from effattn.errors import Unsupported
from effattn.kernels import sparse24
from effattn.projections.packed.base import PackedWeight, register

LARGE = ("unpack", "semi_structured")
EMPTY = 0b01000100  # two groups that keep positions 0 and 1


@register("2:4")
class PackedLinear(PackedWeight):
    """W 2:4 sparse: two of every four weights and their positions.

    values:  parameter (out_features, 2, in_features / 4)
    indices: buffer (out_features, in_features / 8) uint8

    impl "auto" is triton on a GPU for up to 16 rows, else torch. large: what more than 16 rows do
    on a GPU: "unpack" a block of W at a time, or "semi_structured", torch's product on sparse
    tensor cores (compute capability 8.0 and later, 16-bit weights), for which torch's own form of W
    is made at the first such call and kept beside ours: `nbytes` counts it."""

    kernel = sparse24
    LARGE = LARGE
    FITS = "is 2:4 sparse"
    MADE = "sparsity='2:4'"
    indices: Tensor
    _semi_structured: Tensor | None = None

    @classmethod
    def takes(cls, share, group):
        """Half of every four at least, or of every two."""
        return share == 1 or (group in (2, 4) and share >= 0.5)

    def zeros(self, device, dtype):
        """A matrix of zeros, which it keeps at the first two positions."""
        shape = self.out_features, 2, self.in_features // 4
        values = torch.zeros(shape, device=device, dtype=dtype)
        indices = torch.full((shape[0], shape[2] // 2), EMPTY, dtype=torch.uint8, device=device)
        return sparse24.Packed(values, indices)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if self.large == "semi_structured" and x.numel() > sparse24.FEW_ROWS * self.in_features:
            return dense_product(self.in_dtype(x), self.semi_structured(x.device), self.bias)
        return super().forward(x)

    def semi_structured(self, device: torch.device) -> Tensor:
        """The weight in torch's own form. Unsupported where there is no such product."""
        if self._semi_structured is None:
            if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
                raise Unsupported(
                    "large='semi_structured' needs a GPU of compute capability 8.0 or later; "
                    "valid here is 'unpack'"
                )
            self._semi_structured = torch.sparse.to_sparse_semi_structured(self.dense())
        return self._semi_structured

    @property
    def nbytes(self) -> int:
        """Of values, positions and bias, and of torch's own form where it was made."""
        # torch's form: the values again, of 16 bits each, and 2 bits of position beside each
        more = 0 if self._semi_structured is None else 9 * self.values.nbytes // 8
        return super().nbytes + more

    def _apply(self, fn, recurse: bool = True):
        self._semi_structured = None  # it is not moved along
        return super()._apply(fn, recurse)
