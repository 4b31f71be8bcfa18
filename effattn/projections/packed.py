"""`PackedLinear`: a linear layer whose 2:4 sparse weight is kept without its zeros.

The format and its product are `effattn.kernels.sparse24`'s; `effattn.prune.pack` puts these layers
into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_product

from effattn.errors import Unsupported, check_choice
from effattn.interface import Cost
from effattn.kernels import sparse24
from effattn.projections.base import StructuredLinear

LARGE = ("unpack", "semi_structured")


class PackedLinear(StructuredLinear):
    """y = W x + bias for x (..., in_features), W 2:4 sparse; takes the place of an nn.Linear, and
    does not train.

    in_features: a multiple of 8
    values:      parameter (out_features, 2, in_features / 4), which needs no gradient
    indices:     buffer (out_features, in_features / 8) uint8
    bias:        parameter (out_features,), or None

    Gradients of x and of the bias are there. impl: "auto" (triton on a GPU for up to 16 rows, else
    torch), "torch", "triton" or "reference". large: what more than 16 rows do on a GPU: "unpack" a
    block of W at a time, or "semi_structured", torch's product on sparse tensor cores (compute
    capability 8.0 and later, 16-bit weights), for which torch's own form of W is made at the first
    such call and kept beside ours: `nbytes` counts it."""

    spec = "2:4"
    indices: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        impl: str = "auto",
        large: str = "unpack",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """A layer of zeros. ValueError for in_features that are no multiple of 8."""
        super().__init__()
        if in_features % 8:
            raise ValueError(
                f"in_features: got {in_features}, a packed 2:4 weight has a multiple of 8"
            )
        sparse24.choose(impl)
        self.impl, self.large = impl, check_choice("large", large, LARGE)
        self.in_features, self.out_features = in_features, out_features
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        values = torch.zeros(out_features, 2, in_features // 4, **like)
        self.values = nn.Parameter(values, requires_grad=False)
        indices = torch.full(
            (out_features, in_features // 8), 0b01000100, dtype=torch.uint8, device=device
        )
        self.register_buffer("indices", indices)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, **like)) if bias else None
        )
        self._semi_structured: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, *, impl: str = "auto", large: str = "unpack"
    ) -> PackedLinear:
        """The layer that computes the same. ValueError where the weight is not 2:4 sparse."""
        packed = sparse24.pack(linear.weight)
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            impl=impl,
            large=large,
            device="meta",
            dtype=linear.weight.dtype,
        )
        new.values = nn.Parameter(packed.values, requires_grad=False)
        new.indices = packed.indices
        new.bias = linear.bias
        return new.train(linear.training)

    @property
    def packed(self) -> sparse24.Packed:
        """The weight as the kernels take it."""
        return sparse24.Packed(self.values, self.indices)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.values.dtype)
        if self.large == "semi_structured" and x.numel() > sparse24.FEW_ROWS * self.in_features:
            return dense_product(x, self.semi_structured(x.device), self.bias)
        return sparse24.linear(x, self.packed, self.bias, impl=self.impl)

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

    def dense(self) -> Tensor:
        """W, (out_features, in_features)."""
        return sparse24.unpack(self.packed)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        new.weight = nn.Parameter(self.dense())
        new.register_parameter("bias", self.bias)
        return new.train(self.training)

    @property
    def nbytes(self) -> int:
        """Of values, positions and bias, and of torch's own form where it was made."""
        own = self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)
        # torch's form: the values again, of 16 bits each, and 2 bits of position beside each
        return own if self._semi_structured is None else own + 9 * self.values.nbytes // 8

    def cost(self, rows: int, backward: bool = False) -> Cost:
        """The fewest operations (products with zeros are none) and bytes for x (rows, in_features).
        backward: of the backward pass alone, for the gradient of x."""
        size, weight = self.values.element_size(), self.packed.nbytes
        x, y = rows * self.in_features * size, rows * self.out_features * size
        flops = 2 * rows * self.values.numel()
        if backward:
            return Cost(flops, y + weight, x)
        return Cost(flops, x + weight + (0 if self.bias is None else self.bias.nbytes), y)

    def _apply(self, fn, recurse: bool = True):
        self._semi_structured = None  # it is not moved along
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, 2:4"
        )


def layers_of(model: nn.Module) -> dict[str, PackedLinear]:
    """The model's packed layers by their paths."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)
    }


def rebuild(model: nn.Module, names: Iterable[str]) -> None:
    """Puts packed layers, empty yet, where the named linears are. ValueError for names that do not
    fit the model.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for name in names:
        linear = linears.get(name)
        if linear is None:
            raise ValueError(
                f"config.json: effattn: packed: the model has no linear layer {name!r}"
            )
        parent, _, leaf = name.rpartition(".")
        new = PackedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        setattr(model.get_submodule(parent), leaf, new)
