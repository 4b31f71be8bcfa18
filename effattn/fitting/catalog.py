"""Every candidate measured: what each field's values do to the whole model, in each layer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from effattn.fitting.building import Builder
from effattn.fitting.harm import Judge
from effattn.fitting.plan import AXES, Plan, axis_of, is_shaped
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
    `kept` has is not done again. One layer's statistics are held at a time."""
    names = list(_named(ladders))
    waiting = sum(name not in kept.done for _, _, _, name in names)
    waiting_shaped = (i for i, f, v, name in names if is_shaped(f, v) and name not in kept.done)
    last = max(waiting_shaped, default=-1)
    done, rows, hidden = 0, [], []
    if last >= 0:
        hidden = builder.teacher.embed()
    for index in range(len(ladders)):
        own = [one for one in names if one[0] == index]
        shaped = any(is_shaped(f, v) and name not in kept.done for _, f, v, name in own)
        seen, inputs = None, hidden
        if index <= last:
            hidden = [states.clone() for states in inputs]
            if shaped:
                seen = builder.see(index, hidden)
            else:
                hidden = builder.forward(index, hidden)
        for _, field, value, name in own:
            fresh = name not in kept.done

            def make(field=field, value=value, index=index, seen=seen, inputs=inputs) -> dict:
                found = judge.of(builder.alone(index, field, value, seen, inputs))
                return {key: found[key] for key in MEASURED}

            measured = kept.once(name, make)
            rows.append({"layer": index, "field": field, "value": value} | dict(measured))
            done += fresh
            if progress and fresh:
                progress(done, waiting)
    return Catalog(rows)


def _named(ladders: Ladders) -> Iterator[tuple[int, str, object, str]]:
    """(layer, field, value, the name of its part)."""
    for index, ladder in enumerate(ladders):
        for field, values in ladder.items():
            for value in values:
                yield index, field, value, f"candidate/{index}/{field}/{value}"
