"""How much each head, FFN dimension and layer matters: one file a criterion.

    importance = measure("taylor", anatomy.of(model), batches, targets=["heads", "ffn"])
    importance.heads            # (L, K): higher is worth more

A criterion is a function `score(parts, batches, targets, seed) -> Importance` and the `TARGETS` it knows.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.hf.anatomy import Anatomy

from .base import TARGETS, Importance

CRITERIA = ("taylor", "obs", "michel", "activation", "flap", "wanda_sum", "block_influence", "random")


def measure(
    criterion: str, parts: Anatomy, batches: list[Tensor], targets: Iterable[str] = TARGETS, seed: int = 0
) -> Importance:
    """The importance of every structure of `targets`, by one of `CRITERIA`. batches: int64 (batch, length) each.

    Raises ValueError for names, Unsupported for a target that the criterion does not rank (naming those that do), and
    FloatingPointError, naming the layer, when activations are not finite.
    """
    targets = [check_choice("targets", target, TARGETS) for target in targets]
    for target in targets:
        check(criterion, target)
    found = _module(criterion).score(parts, batches, targets, seed)
    found.check()
    return found


def check(criterion: str, target: str) -> None:
    """ValueError for an unknown criterion, Unsupported for one that does not rank `target`, naming those that do."""
    if target not in _module(criterion).TARGETS:
        others = [name for name in CRITERIA if target in _module(name).TARGETS]
        raise Unsupported(f"criterion: {criterion!r} does not rank {target}; {', '.join(map(repr, others))} do")


def _module(name: str):
    check_choice("criterion", name, CRITERIA)
    return importlib.import_module(f"{__name__}.{name}")
