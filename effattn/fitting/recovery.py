"""What a plan has lost, trained back: distillation from the parent, before anything is packed.

The student is the shaped model with the plan's windows, which it is to live with. How weights and
caches are stored is not seen by training, and comes afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from effattn.fitting.building import put_memories
from effattn.fitting.plan import Plan, is_shaped
from effattn.hf import anatomy
from effattn.projections.packed import layers_of
from effattn.surgery.swapping import restore

NOTHING = (
    "there is nothing to recover: the plan changes only how caches and weights are stored, which "
    "training does not see"
)

Train = Callable[[nn.Module, list[nn.Parameter]], dict]


def trainable(plan: Plan, parent: Plan) -> bool:
    """Whether a plan changes anything that training can make good."""
    return any(
        name == "window" or is_shaped(name, value) for _, name, value in plan.changes(parent)
    )


def recover(shaped: nn.Module, plan: Plan, parent: Plan, train: Train) -> tuple[nn.Module, dict]:
    """(the shaped model, trained towards its parent; what was done). train: trains a model's
    parameters in place and says what it did (`effattn.training.uptrain`). A plan with nothing that
    could be trained back is given back as it is, with the reason."""
    if not trainable(plan, parent):
        return shaped, {"tokens": 0, "reason": NOTHING}
    student = copy.deepcopy(shaped)  # it shares weights with its teacher otherwise
    put_memories(student, plan, parent, {"window"})
    packed = {id(one.values) for one in layers_of(student).values()}  # which do not train
    layers = [
        parameter
        for layer in anatomy.of(student)
        for parameter in layer.block.parameters()
        if id(parameter) not in packed
    ]
    told = train(student, layers)
    return restore(student), told
