"""What packed formats share: the layer around a kernel's packed weight, and what a checkpoint says
of it."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from effattn.axes import Axis
from effattn.errors import check_choice
from effattn.interface import Cost
from effattn.projections.base import StructuredLinear

FORMAT = "format"  # of a layer, in config.json
FIRST = "2:4"  # what checkpoints that name no format hold


class PackedWeight(StructuredLinear):
    """y = W x + bias for x (..., in_features), W without its zeros; takes the place of an
    nn.Linear, and does not train.

    in_features: a multiple of 8
    values:      parameter, the weights that are kept; needs no gradient
    bias:        parameter (out_features,), or None

    What else `kernel.Packed` has are buffers of these names. Gradients of x and of the bias are
    there. impl: "auto" (triton on a GPU, else torch), "torch", "triton" or "reference". large: what
    many rows do, "unpack" a block of W at a time, and what else a format's LARGE has."""

    name: ClassVar[str]  # set by `register`
    kernel: ClassVar[ModuleType]  # Packed, pack, unpack, linear, choose
    LARGE: ClassVar[tuple[str, ...]] = ("unpack",)
    SIZES: ClassVar[tuple[str, ...]] = ()  # keyword arguments that a checkpoint must know
    FITS: ClassVar[str]  # what it asks of a weight: "none of the layers ..."
    MADE: ClassVar[str]  # the arguments of `effattn.prune.oneshot` that make it so
    values: nn.Parameter
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
                f"in_features: got {in_features}, a packed {self.name} weight has a multiple of 8"
            )
        self.check_options(impl, large)
        self.impl, self.large = impl, large
        self.in_features, self.out_features = in_features, out_features
        self.hold(self.zeros(device, dtype))
        added = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        self.register_parameter("bias", added if bias else None)

    @classmethod
    def takes(cls, share: float, group: int | None) -> bool:
        """Whether weights fit of which this share is zero: in every `group` of inputs, or (None)
        anywhere."""
        raise NotImplementedError

    @classmethod
    def check_options(cls, impl: str, large: str) -> None:
        """ValueError, naming the nearest valid one, for options that this format does not have."""
        cls.kernel.choose(impl)
        check_choice("large", large, cls.LARGE)

    def zeros(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
        """The kernel's packed weight of these sizes, of zeros."""
        raise NotImplementedError

    def hold(self, packed: Any) -> None:
        """Makes the parts of a packed weight the layer's."""
        for part, tensor in packed._asdict().items():
            if part == "values":
                self.values = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(part, tensor)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, *, impl: str = "auto", large: str = "unpack") -> Self:
        """The layer that computes the same. ValueError where the weight does not fit the
        format."""
        packed = cls.kernel.pack(linear.weight)
        like: dict[str, Any] = dict(device="meta", dtype=linear.weight.dtype)
        like |= dict(impl=impl, large=large)
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, **like)
        new.hold(packed)
        new.bias = linear.bias
        return new.train(linear.training)

    @property
    def spec(self) -> str:  # type: ignore[override]
        """How `describe` shows it."""
        return self.name

    @property
    def packed(self) -> Any:
        """The weight as the kernels take it."""
        kind = self.kernel.Packed
        return kind(*(getattr(self, part) for part in kind._fields))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return self.kernel.linear(self.in_dtype(x), self.packed, self.bias, impl=self.impl)

    def in_dtype(self, x: Tensor) -> Tensor:
        """x in the weight's dtype, where autocast is on."""
        return x.to(self.values.dtype) if torch.is_autocast_enabled(x.device.type) else x

    def dense(self) -> Tensor:
        """W, (out_features, in_features)."""
        return self.kernel.unpack(self.packed)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        new.weight = nn.Parameter(self.dense())
        new.register_parameter("bias", self.bias)
        return new.train(self.training)

    def check(self) -> None:
        """ValueError for parts that do not fit together, as those of a file may not."""

    @property
    def nbytes(self) -> int:
        """Of the packed weight and the bias."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def cost(self, rows: int, backward: bool = False) -> Cost:
        """The fewest operations (products with zeros are none) and bytes for x (rows, in_features).
        backward: of the backward pass alone, for the gradient of x."""
        size, weight = self.values.element_size(), self.packed.nbytes
        x, y = rows * self.in_features * size, rows * self.out_features * size
        flops = 2 * rows * self.values.numel()
        if backward:
            return Cost(flops, y + weight, x)
        return Cost(flops, x + weight + (0 if self.bias is None else self.bias.nbytes), y)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.name}"
        )


FORMATS: Axis[PackedWeight] = Axis("format", "packed format", "effattn.projections.packed")
register = FORMATS.register


def layers_of(model: nn.Module) -> dict[str, PackedWeight]:
    """The model's packed layers by their paths."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)
    }


def record(model: nn.Module) -> dict[str, dict]:
    """What a checkpoint must say so that `rebuild` can make the layers."""
    return {
        name: {FORMAT: layer.name} | {size: getattr(layer, size) for size in layer.SIZES}
        for name, layer in layers_of(model).items()
    }


def _entries(recorded: list | dict) -> dict[str, dict]:
    """path -> entry; a list of paths is what checkpoints had when there was one format."""
    return recorded if isinstance(recorded, dict) else {name: {FORMAT: FIRST} for name in recorded}


def check_recorded(where: str, recorded) -> None:
    """ValueError, beginning with `where`, unless this is what `record` gives."""
    names = recorded if isinstance(recorded, list) else []
    if not isinstance(recorded, list | dict) or not all(isinstance(one, str) for one in names):
        raise ValueError(
            f"{where}: got {recorded!r:.80}, valid is an object of paths of linear layers"
        )
    for name, entry in _entries(recorded).items():
        at = f"{where}: {name:.80}"
        if not isinstance(entry, dict) or not isinstance(entry.get(FORMAT), str):
            raise ValueError(f"{at}: got {entry!r:.80}, valid is an object with a {FORMAT}")
        check_choice(f"{at}: {FORMAT}", entry[FORMAT], FORMATS.members())
        sizes = FORMATS.find(entry[FORMAT]).SIZES
        if entry.keys() != {FORMAT, *sizes} or any(type(entry[one]) is not int for one in sizes):
            raise ValueError(
                f"{at}: got {entry!r:.80}, valid is {', '.join((FORMAT, *sizes))}, of whole numbers"
            )


def rebuild(model: nn.Module, recorded: list | dict) -> None:
    """Puts packed layers, empty yet, where the recorded linears are. ValueError for records that do
    not fit the model.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    for name, entry in _entries(recorded).items():
        linear = linears.get(name)
        if linear is None:
            raise ValueError(
                f"config.json: effattn: packed: the model has no linear layer {name!r}"
            )
        kind = FORMATS.find(entry[FORMAT])
        parent, _, leaf = name.rpartition(".")
        try:
            new = kind(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
                **{size: entry[size] for size in kind.SIZES},
            )
        except ValueError as error:
            raise ValueError(f"config.json: effattn: packed: {name!r}: {error}") from error
        setattr(model.get_submodule(parent), leaf, new)


def check(model: nn.Module) -> None:
    """ValueError, naming the layer, where the packed weights that were loaded are none."""
    for name, layer in layers_of(model).items():
        try:
            layer.check()
        except ValueError as error:
            raise ValueError(f"weights: {name}: {error}") from error
