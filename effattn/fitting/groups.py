"""A model's choices as the solver takes them: for each layer's attention and FFN, every combination
of what their fields may be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from effattn.fitting.accounting import Ledger
from effattn.fitting.budget import SAID, meets
from effattn.fitting.candidates import go_together
from effattn.fitting.catalog import Catalog, Ladders
from effattn.fitting.plan import BLOCKS, WEIGHTS, LayerChoice, Plan, axis_of, is_structured
from effattn.fitting.solver import Option, Problem, solve, undominated

STEP = "tokens_per_s"  # whose row is milliseconds of a step


WEIGHTS_AXIS = "weights"  # of bitsandbytes' formats


def _in(kind: str | None, name: str, value: object) -> bool:
    """Whether a value may be in a plan whose weights are of this kind (`Space.kinds`)."""
    if axis_of(name, value) == WEIGHTS_AXIS:
        return value == kind
    return kind is None or not is_structured(name, value)


@dataclass(frozen=True)
class Times:
    """Of a decoding step: the parent's milliseconds, and what one layer adds for each (field,
    value)."""

    parent: float
    added: Mapping[tuple[str, object], float]


@dataclass
class Space:
    """All plans for one model. ladders: by layer, what each field may be beside what it is; times:
    where speed is a limit."""

    ledger: Ledger
    ladders: Ladders
    catalog: Catalog
    times: Times | None = None
    _found: dict = field(default_factory=dict, repr=False)
    _combined: dict = field(default_factory=dict, repr=False)

    @property
    def parent(self) -> Plan:
        """The plan that changes nothing."""
        return self.ledger.parent

    def groups(
        self, rows: Sequence[str], weights: Mapping[str, float], kind: str | None
    ) -> list[list[Option]]:
        """A group a block, attention and FFN of each layer in order; values are (layer, block,
        choice). weights: axis -> what its harm is multiplied by. kind: the one format that packed
        weights have, which a config can say."""
        key = (tuple(rows), tuple(sorted(weights.items())), kind)
        if key not in self._found:
            self._found[key] = [
                undominated(list(self._options(index, block, rows, weights, kind)))
                for index in range(len(self.ladders))
                for block in BLOCKS
            ]
        return self._found[key]

    def _choices(self, index: int, block: str, kind: str | None) -> list[LayerChoice]:
        """Every combination of what a block's fields may be."""
        key = (index, block, kind)
        if key not in self._combined:
            self._combined[key] = self._combinations(index, block, kind)
        return self._combined[key]

    def _combinations(self, index: int, block: str, kind: str | None) -> list[LayerChoice]:
        own, ladder = self.parent.layers[index], self.ladders[index]
        found = [own]
        for name in BLOCKS[block]:
            values = [value for value in ladder.get(name, []) if _in(kind, name, value)]
            more = [replace(one, **{name: value}) for value in values for one in found]
            # what two fields cannot have together, no third one mends
            found += [one for one in more if go_together(one, own)]
        return found

    def _options(self, index: int, block: str, rows, weights, kind) -> Iterator[Option]:
        own, harm = self.parent.layers[index], self.catalog.harm
        for choice in self._choices(index, block, kind):
            changed = choice.changes(own)
            total = sum(weights[axis_of(n, v)] * harm[index, n, v] for n, v in changed.items())
            yield Option(total, self._costs(index, block, choice, rows), (index, block, choice))

    def _costs(self, index: int, block: str, choice: LayerChoice, rows) -> dict[str, float]:
        costs = self.ledger.block(index, block, choice)
        found = {row: costs[row] for row in rows if row != STEP}
        if STEP in rows:
            changed = choice.changes(self.parent.layers[index])
            found[STEP] = sum(self._times.added[pair] for pair in changed.items())
        return found

    @property
    def _times(self) -> Times:
        assert self.times is not None  # whoever limits speed has measured it
        return self.times

    def left(self, limits: Mapping[str, float]) -> dict[str, float]:
        """Row -> what the groups together may take."""
        fixed = self.ledger.fixed()
        found = {row: limit - fixed[row] for row, limit in limits.items() if row != STEP}
        if STEP in limits:
            found[STEP] = 1000 * self.ledger.batch / limits[STEP] - self._times.parent
        return found

    def step_ms(self, plan: Plan) -> float:
        """Milliseconds of a decoding step, as the times add up."""
        added = (self._times.added[name, value] for _, name, value in plan.changes(self.parent))
        return self._times.parent + sum(added)

    def plan_of(self, groups: Sequence[Sequence[Option]], picks: Sequence[int]) -> Plan:
        """The plan that those picks are."""
        layers = list(self.parent.layers)
        for group, pick in zip(groups, picks, strict=True):
            index, block, choice = group[pick].value
            changed = {name: getattr(choice, name) for name in BLOCKS[block]}
            layers[index] = replace(layers[index], **changed)
        return Plan(tuple(layers))

    def picks_of(self, groups: Sequence[Sequence[Option]], plan: Plan) -> tuple[int, ...] | None:
        """Where a plan's choices are in the groups; None where one of them is beaten by another."""
        places = []
        for group in groups:
            index, block, _ = group[0].value
            wanted = [getattr(plan.layers[index], name) for name in BLOCKS[block]]
            place = next(
                (
                    number
                    for number, one in enumerate(group)
                    if [getattr(one.value[2], name) for name in BLOCKS[block]] == wanted
                ),
                None,
            )
            if place is None:
                return None
            places.append(place)
        return tuple(places)

    def kinds(self) -> list[str | None]:
        """What all weights of a plan may be beside plain: one format of bitsandbytes, which a
        config can say once and which packs plain linears alone, or (None) what is structured."""
        values = [(n, v) for ladder in self.ladders for n in ladder for v in ladder[n]]
        packed = [v for n, v in values if n in WEIGHTS and axis_of(n, v) == WEIGHTS_AXIS]
        structured = any(is_structured(*one) for one in values)
        found = list(dict.fromkeys(packed))
        return [*found, None] if structured or not found else found

    def allows(self, plan: Plan) -> bool:
        """Whether each layer, and one checkpoint, can have all of a plan at once."""
        pairs = zip(plan.layers, self.parent.layers, strict=True)
        changes = [change[1:] for change in plan.changes(self.parent)]
        return all(go_together(*one) for one in pairs) and any(
            all(_in(kind, name, value) for name, value in changes) for kind in self.kinds()
        )

    def least(self, row: str) -> float:
        """The least that any plan takes of a row, or milliseconds of the fastest step."""
        totals = []
        for kind in self.kinds():
            totals.append(sum(self._least(index, row, kind) for index in range(len(self.ladders))))
        if row == STEP:
            return self._times.parent + min(totals)
        return self.ledger.fixed()[row] + min(totals)

    def _least(self, index: int, row: str, kind: str | None) -> float:
        """The least that a layer's attention and FFN take."""
        return sum(
            min(
                self._costs(index, block, choice, [row])[row]
                for choice in self._choices(index, block, kind)
            )
            for block in BLOCKS
        )

    def check_least(self, limits: Mapping[str, float]) -> None:
        """ValueError for a limit below the smallest plan, with what that takes. Needs no harm."""
        for row, limit in limits.items():
            least = self.least(row)
            if row == STEP and least <= 0:  # savings that overlap: their sum bounds nothing
                continue
            nearest = 1000 * self.ledger.batch / least if row == STEP else least
            if (nearest < limit) if row == STEP else (nearest > limit):
                word = "most" if row == STEP else "least"
                raise ValueError(
                    f"{row}: got {limit:,.0f} {SAID[row]}; the {word} that a plan can have is "
                    f"{nearest:,.0f}"
                )

    def check(self, limits: Mapping[str, float]) -> None:
        """ValueError for limits that no plan is within, each alone or all together, with the
        nearest that one is within. Needs no harm."""
        self.check_least(limits)
        if len(limits) == 1:
            return
        nearest: dict[str, float] = {}
        for row, limit in limits.items():
            nearest[row] = self._nearest(row, limits)
            if meets(row, nearest[row], limit):
                return
        told = ", ".join(
            f"{'at most' if row == STEP else 'at least'} {value:,.0f} {row}"
            for row, value in nearest.items()
        )
        raise ValueError(
            f"budget: {', '.join(limits)} cannot be met together, each of them alone can; with the "
            f"others as they are, one of these can: {told}"
        )

    def _nearest(self, row: str, limits: Mapping[str, float]) -> float:
        """The best value of a row among plans within all other limits."""
        others = {name: limit for name, limit in limits.items() if name != row}
        least = math.inf
        for kind in self.kinds():
            groups = []
            for index, block in itertools.product(range(len(self.ladders)), BLOCKS):
                costs = (
                    self._costs(index, block, choice, [*others, row])
                    for choice in self._choices(index, block, kind)
                )
                groups.append(undominated([Option(one.pop(row), one) for one in costs]))
            found = solve(Problem(groups, self.left(others)))
            least = min(least, math.inf if found is None else found.harm)
        if row == STEP:
            step = self._times.parent + least
            return 1000 * self.ledger.batch / step if step > 0 else math.inf
        return self.ledger.fixed()[row] + least
