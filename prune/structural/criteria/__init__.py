"""How much each head, FFN dimension and layer matters: one file a criterion.

    importance = measure("taylor", anatomy.of(model), batches, targets=["heads", "ffn"])
    importance.heads            # (L, K): higher is worth more

A criterion is a function `score(parts, batches, targets, seed) -> Importance` that says which
targets it knows, and whether it takes gradients:

    @criterion("taylor", ("heads", "ffn", "layers"), needs_loss=True)
    def score(parts, batches, targets, seed): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.hf.anatomy import Anatomy
from effattn.prune.structural.criteria.base import (
    TARGETS,
    Criterion,
    Importance,
    Told,
    registered,
)


def criteria() -> dict[str, Criterion]:
    """name -> criterion, of every one in this version."""
    for file in pkgutil.iter_modules(__path__):  # they register themselves
        importlib.import_module(f"{__name__}.{file.name}")
    return registered()


CRITERIA = tuple(criteria())


def find(name: str) -> Criterion:
    """The criterion of that name. ValueError, with the nearest name, for another."""
    return registered()[check_choice("criterion", name, CRITERIA)]


def measure(
    criterion: str,
    parts: Anatomy,
    batches: list[Tensor],
    targets: Iterable[str] = TARGETS,
    seed: int = 0,
    removed: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """The importance of every structure of `targets`, by one of `CRITERIA`. batches: int64 (batch,
    length) each. removed: target -> how many of a layer will go; a criterion that removes them one
    after the other need go no further. progress: called with (batches done, batches).

    Raises ValueError for names, Unsupported for a target that the criterion does not rank (naming
    those that do), and FloatingPointError, naming the layer, when activations are not finite."""
    targets = [check_choice("targets", target, TARGETS) for target in targets]
    for target in targets:
        check(criterion, target, parts)
    chosen = find(criterion)
    more = {"removed": removed or {}} if chosen.stops else {}
    told = batches if progress is None else Told(batches, progress)
    found = chosen.score(parts, told, targets, seed, **more)
    found.check()
    return found


def check(criterion: str, target: str, parts: Anatomy) -> None:
    """ValueError for an unknown criterion, Unsupported for one that does not rank `target`, or that
    needs a loss which this model does not have; naming those that can."""
    chosen = find(criterion)
    others = [one for one in registered().values() if target in one.targets]
    if target not in chosen.targets:
        able = ", ".join(repr(one.name) for one in others)
        raise Unsupported(f"criterion: {criterion!r} does not rank {target}; {able} do")
    if chosen.needs_loss and not parts.predicts_next:
        free = ", ".join(repr(one.name) for one in others if not one.needs_loss)
        raise Unsupported(
            f"criterion: {criterion!r} needs the loss on next tokens, which "
            f"{type(parts.model).__name__} does not predict; valid for {target} without a loss "
            f"are {free}"
        )
