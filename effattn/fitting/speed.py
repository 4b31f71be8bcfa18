"""How long a decoding step takes here with each candidate, measured, and what each adds to it.

Speed does not depend on the values of weights: a model with one candidate in all layers is timed
beside the parent, and one layer's share of the difference is what a plan adds for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from effattn.fitting.accounting import Ledger
from effattn.fitting.building import finish, twin
from effattn.fitting.candidates import go_together
from effattn.fitting.catalog import Ladders
from effattn.fitting.groups import Times
from effattn.fitting.plan import Plan
from effattn.fitting.shaping import hollow
from effattn.hf import anatomy, shapes
from effattn.quant.sensitivity.lanes import Lane, decode_speed

PARENT = "parent"
SECONDS = 2.0  # about so long for a pair of models


def mock(ledger: Ledger, plan: Plan) -> nn.Module:
    """A model of the plan's shapes whose weights mean nothing: what is timed of it is right."""
    changed = plan.shaped(ledger.parent)
    model = twin(ledger.parts, changed)
    layers = anatomy.of(model).layers
    for index in changed:
        hollow(layers[index], plan.layers[index], ledger.parent.layers[index])
    shapes.settle(model)
    return finish(model, plan, ledger.parent)


def timed(
    models: dict[str, nn.Module],
    context: int,
    batch: int,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Name -> milliseconds of a step (median) after a prompt of `context` tokens, the models taking
    turns. ValueError for caches that do not fit into memory."""
    lanes = [Lane(name, None, model) for name, model in models.items()]
    how = {"seconds": SECONDS, "steps": steps, "seed": 0, "progress": progress}
    rows = decode_speed(lanes, context, [batch], **how)
    for row in rows:
        if "does_not_fit" in row:
            raise ValueError(
                f"context: got {context:,} x {batch}, of which caches take "
                f"{row['does_not_fit']:,} bytes here, more than there are to time a step with"
            )
    return {row["lane"]: row["ms"] for row in rows}


def times(
    ledger: Ledger,
    ladders: Ladders,
    steps: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """{"parent": milliseconds, "added": [[field, value, milliseconds a layer], ...]}, for JSON."""
    context, batch = ledger.context, ledger.batch
    pairs = dict.fromkeys((f, v) for ladder in ladders for f in ladder for v in ladder[f])
    added, parents = [], []
    for number, (name, value) in enumerate(pairs):
        layers = [i for i, ladder in enumerate(ladders) if value in ladder.get(name, [])]
        plan = ledger.parent.with_field(name, value, layers)
        assert all(map(go_together, plan.layers, ledger.parent.layers))
        models = {PARENT: ledger.parts.model, "candidate": mock(ledger, plan)}
        found = timed(models, context, batch, steps)
        parents.append(found[PARENT])
        added.append([name, value, (found["candidate"] - found[PARENT]) / len(layers)])
        if progress:
            progress(number + 1, len(pairs))
    return {"parent": sorted(parents)[len(parents) // 2], "added": added}


def times_of(found: dict) -> Times:
    """What `times` gave, for a space of plans."""
    return Times(found["parent"], {(name, value): ms for name, value, ms in found["added"]})
