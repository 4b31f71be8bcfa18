"""What a one-shot method is: a file beside this one, which registers itself.

    @register
    class Wanda(Masking):
        name, needs, source = "wanda", Needs.NORMS, "arXiv:2306.11695"

        def mask(self, weight, statistics, sparsity): ...

It says what it must know of a layer's input, and prunes one weight matrix with that. Calibration,
the walk over the layers and the report ask it for nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from effattn.calibration.hessian import Hessian
from effattn.prune.unstructured.nm import Sparsity


class Needs(IntEnum):
    """What a method must know of a linear layer's input x, from the least to the most."""

    NOTHING = 0  # then it needs no calibration tokens either
    NORMS = 1  # the mean of 2 x_j^2, (inputs,)
    MOMENTS = 2  # the mean of 2 x x^T, (inputs, inputs)


@dataclass(frozen=True)
class Options:
    """What users may set of methods; each reads what concerns it. See `InverseHessian` and
    `sparsegpt`."""

    damping: float
    raise_damping: bool
    block: int


class Method(ABC):
    """A way to prune one weight matrix. `updates`: whether weights that stay change, too. `source`:
    the paper."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    updates: ClassVar[bool]
    source: ClassVar[str]

    def prepare(self, seen: Hessian, name: str, options: Options) -> Any:
        """What `prune` takes as `statistics`, from all that was seen of an input; once for all
        matrices that share it. name: theirs, for errors. Not called where the method needs
        nothing."""
        return seen.mean if self.needs is Needs.MOMENTS else seen.diagonal

    @abstractmethod
    def prune(
        self, weight: Tensor, statistics: Any, sparsity: Sparsity, name: str, options: Options
    ) -> tuple[Tensor, dict]:
        """weight (outputs, inputs) of any floating dtype, pruned to `sparsity`: a new tensor of the
        same dtype, and what the report tells of it (JSON-able)."""


class Masking(Method):
    """A method that only chooses what goes: it writes `mask`."""

    updates = False

    @abstractmethod
    def mask(self, weight: Tensor, statistics: Any, sparsity: Sparsity) -> Tensor:
        """What to prune of weight (outputs, inputs), fp32 or fp64: bool, True goes."""

    def prune(
        self, weight: Tensor, statistics: Any, sparsity: Sparsity, name: str, options: Options
    ) -> tuple[Tensor, dict]:
        work = weight if weight.dtype == torch.float64 else weight.float()
        return weight.masked_fill(self.mask(work, statistics, sparsity), 0), {}


_METHODS: dict[str, Method] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: makes a method known under its `name`."""
    if cls.name in _METHODS:
        raise ValueError(f"one-shot method {cls.name!r} is registered already")
    _METHODS[cls.name] = cls()
    return cls


def registered() -> dict[str, Method]:
    """name -> method, of those whose files were imported; `methods()` imports all of them."""
    return dict(_METHODS)
