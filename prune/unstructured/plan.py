"""What one-shot pruning is asked to do, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from effattn.errors import check_choice
from effattn.hf import anatomy as hf
from effattn.prune.unstructured import layers
from effattn.prune.unstructured.methods import methods
from effattn.prune.unstructured.methods.base import Method, Options, registered
from effattn.prune.unstructured.nm import Sparsity

METHODS = tuple(methods())
ALLOCATIONS = ("uniform", "sensitivity")


@dataclass(frozen=True)
class Plan:
    """What is done to every layer: `sparsities` has an entry a layer, `asked` is what they were
    asked for as."""

    method: str
    sparsities: tuple[Sparsity, ...]
    asked: str
    modules: str
    allocation: str
    options: Options

    @property
    def way(self) -> Method:
        """The method itself."""
        return registered()[self.method]

    @property
    def by_sensitivity(self) -> bool:
        """Whether shares follow the layers' outliers."""
        return self.allocation == "sensitivity"

    def settings(self, length: int, tokens: Tensor | None) -> dict:
        """What reports tell: all of this, and the calibration in windows of `length`."""
        return {
            "method": self.method,
            "sparsity": self.asked,
            "modules": self.modules,
            "allocation": self.allocation,
            "damping": self.options.damping,
            "raise_damping": self.options.raise_damping,
            "block": self.options.block,
            "length": length,
            "calibration_tokens": 0 if tokens is None else len(tokens) // length * length,
        }


def said(sparsity: float | str | Sequence[float | str]) -> str:
    """What was asked for, as one text."""
    if isinstance(sparsity, int | float | str | Sparsity):
        return str(sparsity)
    return ", ".join(map(str, sparsity))


def make_plan(
    all_layers: Sequence[hf.Layer],
    method: str,
    sparsity: float | str | Sequence[float | str],
    modules: str,
    allocation: str,
    *,
    damping: float,
    raise_damping: bool,
    block: int,
) -> Plan:
    """The checked settings; for what they mean see `effattn.prune.oneshot`. Raises ValueError and
    Unsupported."""
    check_choice("method", method, METHODS)
    check_choice("allocation", allocation, ALLOCATIONS)
    wanted = _sparsities(sparsity, len(all_layers))
    if allocation == "sensitivity" and any(one.m is not None for one in wanted):
        raise ValueError(
            "allocation: 'sensitivity' needs a share of weights, N:M is the same in every layer"
        )
    if damping < 0:
        raise ValueError(
            f"damping: got {damping}, valid is 0 or more (a share of the Hessian's diagonal)"
        )
    if block < 1:
        raise ValueError(f"block: got {block}, valid is a positive number of columns")
    for layer, one in zip(all_layers, wanted, strict=True):
        for path, linear in layers.linears(layer, modules).items():
            one.check_inputs(linear.in_features, f"layer {layer.index}'s {path}")
    options = Options(damping, raise_damping, block)
    return Plan(method, wanted, said(sparsity), modules, allocation, options)


def _sparsities(sparsity, count: int) -> tuple[Sparsity, ...]:
    """One for each of `count` layers. ValueError for a list of another length."""
    if isinstance(sparsity, int | float | str | Sparsity):
        return (Sparsity.parse(sparsity),) * count
    wanted = tuple(
        Sparsity.parse(one, f"sparsity of layer {index}") for index, one in enumerate(sparsity)
    )
    if len(wanted) != count:
        raise ValueError(
            f"sparsity: got a list of {len(wanted)}, the model has {count} layers; valid is "
            "one for each"
        )
    return wanted
