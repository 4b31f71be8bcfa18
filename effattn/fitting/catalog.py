"""Every candidate measured: what each field's values do to the whole model, in each layer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from effattn.fitting.building import Builder
from effattn.fitting.harm import Judge
from effattn.fitting.plan import AXES, Plan, axis_of, is_shaped
from effattn.fitting.shaping import Seen
from effattn.resuming import Parts

Ladders = Sequence[Mapping[str, list]]
MEASURED = ("kl", "perplexity", "agreement")


@dataclass
class Catalog:
    """rows: {layer, field, value, kl, perplexity, agreement} of each candidate."""

    rows: list[dict]

    @cached_property
    def harm(self) -> dict[tuple[int, str, object], float]:
        """(layer, field, value) -> nats a token, never below 0."""
        return {
            (row["layer"], row["field"], row["value"]): max(0.0, row["kl"]) for row in self.rows
        }

    def by_axis(self, plan: Plan, parent: Plan) -> dict[str, float]:
        """Axis -> the sum of its candidates' harm in a plan."""
        harm, found = self.harm, dict.fromkeys(AXES, 0.0)
        for change in plan.changes(parent):
            found[axis_of(*change[1:])] += harm[change]
        return found


def measure(
    builder: Builder,
    judge: Judge,
    ladders: Ladders,
    kept: Parts,
    progress: Callable[[int, int], None] | None = None,
) -> Catalog:
    """Builds each candidate in its layer, the others as they are, re-fits it, and measures it; what
    `kept` has is not done again. One layer's statistics are held at a time, and its inputs: what
    comes before a candidate is the parent, and is not run for each."""
    names = list(_named(ladders))
    fresh = [one for one in names if one[3] not in kept.done]
    last = max((one[0] for one in fresh), default=-1)
    last_shaped = max((i for i, f, v, _ in fresh if is_shaped(f, v)), default=-1)
    rows, done, waiting = [], 0, len(fresh)
    hidden = builder.teacher.embed() if last_shaped >= 0 else []
    scored = judge.layers.embed() if last >= 0 else []
    for index in range(len(ladders)):
        seen, inputs = None, hidden
        if index <= last_shaped:
            hidden = [states.clone() for states in inputs]
            if any(i == index and is_shaped(f, v) for i, f, v, _ in fresh):
                seen = builder.see(index, hidden)
            else:
                hidden = builder.forward(index, hidden)
        for _, field, value, name in (one for one in names if one[0] == index):
            new = name not in kept.done

            what = {"layer": index, "field": field, "value": value}
            make = partial(_one, builder, judge, index, field, value, seen, inputs, scored)
            rows.append(what | dict(kept.once(name, make)))
            done += new
            if progress and new:
                progress(done, waiting)
        if index < last:
            scored = judge.layers.run(index, scored)
    return Catalog(rows)


def _one(
    builder: Builder,
    judge: Judge,
    index: int,
    field: str,
    value,
    seen: Seen | None,
    inputs: Sequence[Tensor],
    scored: Sequence[Tensor],
) -> dict[str, float]:
    """One candidate. inputs, scored: what the layer gets of the text that is fitted to, and of the
    one that is measured on."""
    student = builder.alone(index, field, value, seen, inputs)
    found = judge.alone(student, index, scored)
    return {key: found[key] for key in MEASURED}


def _named(ladders: Ladders) -> Iterator[tuple[int, str, object, str]]:
    """(layer, field, value, the name of its part)."""
    for index, ladder in enumerate(ladders):
        for field, values in ladder.items():
            for value in values:
                yield index, field, value, f"candidate/{index}/{field}/{value}"
