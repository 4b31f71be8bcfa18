"""How much each head, FFN dimension and layer matters: one file a criterion.

    importance = measure("taylor", anatomy.of(model), batches, targets=["heads", "ffn"])
    importance.heads            # (L, K): higher is worth more

A criterion is a function `score(parts, batches, targets, seed) -> Importance` and the `TARGETS` it
knows; those that take gradients say `NEEDS_LOSS`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.hf.anatomy import Anatomy
from effattn.prune.structural.criteria.base import TARGETS, Importance

CRITERIA = (
    "taylor",
    "obs",
    "michel",
    "activation",
    "flap",
    "wanda_sum",
    "block_influence",
    "random",
)


def measure(
    criterion: str,
    parts: Anatomy,
    batches: list[Tensor],
    targets: Iterable[str] = TARGETS,
    seed: int = 0,
) -> Importance:
    """The importance of every structure of `targets`, by one of `CRITERIA`. batches: int64 (batch,
    length) each.

    Raises ValueError for names, Unsupported for a target that the criterion does not rank (naming
    those that do), and FloatingPointError, naming the layer, when activations are not finite."""
    targets = [check_choice("targets", target, TARGETS) for target in targets]
    for target in targets:
        check(criterion, target, parts)
    found = _module(criterion).score(parts, batches, targets, seed)
    found.check()
    return found


def check(criterion: str, target: str, parts: Anatomy) -> None:
    """ValueError for an unknown criterion, Unsupported for one that does not rank `target`, or that
    needs a loss which this model does not have; naming those that can."""
    chosen = _module(criterion)
    others = [name for name in CRITERIA if target in _module(name).TARGETS]
    if target not in chosen.TARGETS:
        raise Unsupported(
            f"criterion: {criterion!r} does not rank {target}; {', '.join(map(repr, others))} do"
        )
    if needs_loss(criterion) and not parts.predicts_next:
        free = [name for name in others if not needs_loss(name)]
        raise Unsupported(
            f"criterion: {criterion!r} needs the loss on next tokens, which "
            f"{type(parts.model).__name__} does not "
            f"predict; valid for {target} without a loss are {', '.join(map(repr, free))}"
        )


def needs_loss(criterion: str) -> bool:
    """Whether a criterion takes gradients of the loss on next tokens."""
    return getattr(_module(criterion), "NEEDS_LOSS", False)


def _module(name: str):
    check_choice("criterion", name, CRITERIA)
    return importlib.import_module(f"{__name__}.{name}")
