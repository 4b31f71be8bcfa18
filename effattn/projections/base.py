"""What structured projections are: linear layers that keep their weight in another form.

A member of the axis, such as `MonarchLinear`, is one file of this package: a subclass of
`ProjectedLinear` that registers itself under the name that its specs begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from effattn.axes import Axis
from effattn.errors import check_choice
from effattn.specs import parse_spec

METHODS = ("svd", "data")  # closest weights, or closest outputs on the calibration tokens
FITTED = ("spec", "error", "output_error")  # what a checkpoint says of every one beside its sizes


class StructuredLinear(nn.Module):
    """Takes the place of an nn.Linear: x (..., in_features) -> (..., out_features). `spec`: how it
    is described."""

    spec: str
    in_features: int
    out_features: int

    def dense(self) -> Tensor:
        """W, (out_features, in_features)."""
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """A new nn.Linear that computes the same, in the same dtype and on the same device."""
        raise NotImplementedError


class Shared(Protocol):
    """One budget for all matrices of a spec: it looks at each of them, and says what each gets once
    it knows all."""

    def look(self, linear: nn.Linear, moment: Tensor | None) -> Tensor:
        """What it has to know of a matrix, (n,) fp64; moment as for
        `ProjectedLinear.from_linear`."""
        ...

    def add(self, name: str, linear: nn.Linear | StructuredLinear, seen: Tensor) -> None:
        """What `look` has said of the matrix at path `name`."""
        ...

    def sizes(self) -> dict[str, dict | None]:
        """By path, the options that `from_linear` then takes; None: it stays the linear that it
        is."""
        ...


class ProjectedLinear(StructuredLinear):
    """One that approximates the linear layer that it was made of; made anew with its sizes as
    keyword arguments. Its weight is a product of two parameters, `left` and `right`.

    error: |W - its original| / |its original| (Frobenius) when it was projected; None for a new
    layer. output_error: the same of the outputs, where it was projected with a second moment."""

    name: ClassVar[str]  # set by `register`
    EXAMPLE: ClassVar[str]  # a spec
    SIZES: ClassVar[Mapping[str, tuple[type, ...]]]  # what a checkpoint must know, and its types
    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None
    error: float | None
    output_error: float | None

    @classmethod
    def options(cls, *args: Any, **given: Any) -> dict:
        """The options of a spec, checked as far as no weight is needed: `method`, `ffn` (the
        linears of the FFN too), and those that `check_sizes` and `from_linear` take."""
        raise NotImplementedError

    @classmethod
    def check_sizes(
        cls, in_features: int, out_features: int, *, where: str, **options: Any
    ) -> None:
        """ValueError, beginning with `where`, for options that such a weight cannot have."""
        raise NotImplementedError

    @classmethod
    def shared(cls, **options: Any) -> Shared | None:
        """What decides the sizes of all matrices of one spec together; None: each is by itself."""
        return None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *args: Any, **options: Any) -> ProjectedLinear:
        """The layer closest to `linear`: in its weights, or with `moment=`, (in_features,
        in_features), in its outputs for inputs of that second moment."""
        raise NotImplementedError

    @torch.no_grad()
    def take(self, linear: nn.Linear, right: Tensor, left: Tensor, moment: Tensor | None) -> Self:
        """These factors for the weight of `linear`; its bias and its flags; and notes the
        errors."""
        self.right.copy_(right)
        self.left.copy_(left)
        self.error = relative_error(linear.weight, self.dense())
        if moment is not None:
            self.output_error = relative_error(linear.weight, self.dense(), moment)
        self.right.requires_grad_(linear.weight.requires_grad)
        self.left.requires_grad_(linear.weight.requires_grad)
        if self.bias is not None:
            self.bias.copy_(linear.bias)
            self.bias.requires_grad_(linear.bias.requires_grad)
        return self.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same."""
        like: dict[str, Any] = dict(device=self.left.device, dtype=self.left.dtype)
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        new.weight.copy_(self.dense())
        new.weight.requires_grad_(self.left.requires_grad)
        if self.bias is not None:
            new.bias.copy_(self.bias)
            new.bias.requires_grad_(self.bias.requires_grad)
        return new.train(self.training)

    @property
    def nbytes(self) -> int:
        """Of all parameters, padding included."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @property
    def weight_parameters(self) -> int:
        """How many numbers stand for the weight, padding included."""
        raise NotImplementedError

    @classmethod
    def saved(cls) -> tuple[str, ...]:
        """The attributes that a checkpoint says of each, beside its weights."""
        return (*cls.SIZES, *FITTED)


PROJECTIONS: Axis[ProjectedLinear] = Axis("projections", "projection", "effattn.projections")
register = PROJECTIONS.register


def check_common(name: str, method: str, **switches: bool) -> None:
    """ValueError for options that every projection has: the method, and what is on or off."""
    check_choice(f"projections: {name}: method", method, METHODS)
    for switch, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"projections: {name}: {switch}: got {value!r}, valid are True and False"
            )


def recorded_kind(entry: object) -> type[ProjectedLinear]:
    """The projection that an entry of a checkpoint's config.json is about: the one that its spec
    names; Monarch, which was the only one once, where it names none."""
    spec = entry.get("spec") if isinstance(entry, dict) else None
    try:
        name = parse_spec(spec)[0] if isinstance(spec, str) else ""
    except ValueError:
        name = ""
    known = PROJECTIONS.members()
    return known.get(name, known["monarch"])


def relative_error(original: Tensor, weight: Tensor, moment: Tensor | None = None) -> float:
    """|weight - original| / |original|, Frobenius; of the outputs for inputs of second moment
    `moment`, if it is given.

    For a zero original, the distance itself.
    """

    def norm(w: Tensor) -> float:
        square = (w * w).sum() if moment is None else ((w @ moment.to(w)) * w).sum()
        return max(square.item(), 0.0) ** 0.5

    distance, size = norm(original.double() - weight.double()), norm(original.double())
    return distance / size if size else distance
