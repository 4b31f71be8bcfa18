"""What structured projections are: linear layers that keep their weight in another form.

A member of the axis, such as `MonarchLinear`, is one file of this package: a subclass of
`ProjectedLinear` that registers itself under the name that its specs begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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


class ProjectedLinear(StructuredLinear):
    """One that approximates the linear layer that it was made of; made anew with its sizes as
    keyword arguments.

    error: |W - its original| / |its original| (Frobenius) when it was projected; None for a new
    layer. output_error: the same of the outputs, where it was projected with a second moment."""

    name: ClassVar[str]  # set by `register`
    EXAMPLE: ClassVar[str]  # a spec
    SIZES: ClassVar[Mapping[str, tuple[type, ...]]]  # what a checkpoint must know, and its types
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
    def from_linear(cls, linear: nn.Linear, *args: Any, **options: Any) -> ProjectedLinear:
        """The layer closest to `linear`: in its weights, or with `moment=`, (in_features,
        in_features), in its outputs for inputs of that second moment."""
        raise NotImplementedError

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
