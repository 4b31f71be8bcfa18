"""The plan for a budget: solved for, measured as a whole, and solved for again.

That the harm of layers adds up is a model. What it misses is mostly one factor an axis (packed
caches in all layers at once harm less, or more, than one by one), so that each plan that was
measured as a whole tells what the harm of each axis is to be multiplied by. The search ends when
nothing that was not measured is expected to be better than the best that was, or when it has not
become better for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from effattn.fitting.budget import meets
from effattn.fitting.candidates import FORMATS
from effattn.fitting.groups import STEP, Space
from effattn.fitting.plan import AXES, FIELDS, WEIGHTS, Plan, axis_of
from effattn.fitting.solver import Problem, solve

ROUNDS = 8  # plans that are measured for one budget, at most
PATIENCE = 3  # rounds without a better one
PULL = 0.3  # of the factors towards 1
FACTORS = (0.05, 20.0)  # between which they are

Measure = Callable[[Plan], dict]


@dataclass
class Tried:
    """A plan that was measured as a whole. name: of a baseline, "" of what was solved for;
    additive: the sum of its parts' harm; expected: what the factors made of it before it was
    measured."""

    plan: Plan
    kl: float
    additive: float
    expected: float
    name: str = ""


@dataclass
class Found:
    """The search's end. best: of all that was tried within the limits; gap: of the solver, for the
    first plan; factors: axis -> factor, at the end."""

    best: Tried
    tried: list[Tried]
    gap: float
    factors: dict[str, float]
    baselines: list[Tried] = field(default_factory=list)


def search(
    space: Space,
    limits: Mapping[str, float],
    measure: Measure,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The best plan within `limits` (row -> number). measure: a plan as a whole -> {"kl", ...}.
    ValueError where there is no plan."""
    space.check(limits)
    found = Factors(space)
    baselines = [
        found.add(plan, measure(plan)["kl"], name) for name, plan in uniform(space, limits).items()
    ]
    tried, gap, waiting = list(baselines), 0.0, 0
    for number in range(rounds):
        if progress:
            progress(number, rounds)
        plan, own_gap = _next(space, limits, found.factors, [one.plan for one in tried])
        gap = own_gap if number == 0 else gap
        if plan is None:
            break
        best = min((one.kl for one in tried), default=np.inf)
        own = [one for one in tried if not one.name]
        if own and (waiting >= PATIENCE or found.expected(plan) >= best):
            break
        new = found.add(plan, measure(plan)["kl"])
        tried.append(new)
        waiting = 0 if new.kl < best else waiting + 1
    if progress:
        progress(rounds, rounds)
    best_one = min(tried, key=lambda one: one.kl)
    return Found(best_one, tried, gap, found.factors, baselines)


def _next(
    space: Space, limits: Mapping[str, float], factors: Mapping[str, float], tried: Sequence[Plan]
) -> tuple[Plan | None, float]:
    """(the plan of least expected harm that was not tried, the solver's gap); None without one."""
    rows, found = list(limits), []
    for kind in space.kinds():
        groups = space.groups(rows, factors, kind)
        picks = (space.picks_of(groups, plan) for plan in tried)
        excluded = [(one, 1) for one in picks if one is not None]
        solution = solve(Problem(groups, space.left(limits), excluded))
        if solution is not None:
            found.append((solution.harm, solution.gap, space.plan_of(groups, solution.picks)))
    if not found:
        return None, 0.0
    _, gap, plan = min(found, key=lambda one: one[0])
    return plan, gap


class Factors:
    """What each axis' harm is multiplied by, from all plans that were measured as wholes."""

    def __init__(self, space: Space):
        self.space, self.factors = space, dict.fromkeys(AXES, 1.0)
        self._measured: list[tuple[dict[str, float], float]] = []

    def expected(self, plan: Plan) -> float:
        """The harm of a plan as the factors have it, nats a token."""
        parts = self.space.catalog.by_axis(plan, self.space.parent)
        return sum(self.factors[axis] * harm for axis, harm in parts.items())

    def add(self, plan: Plan, kl: float, name: str = "") -> Tried:
        """A plan that was measured."""
        parts = self.space.catalog.by_axis(plan, self.space.parent)
        tried = Tried(plan, kl, sum(parts.values()), self.expected(plan), name)
        if kl > 0 and tried.additive > 0:
            self._measured.append((parts, kl))
            self.factors = self._fit()
        return tried

    def _fit(self) -> dict[str, float]:
        """Least squares of the relative errors, pulled towards 1."""
        from scipy.optimize import lsq_linear

        axes = list(self.factors)
        rows = [[parts[axis] / kl for axis in axes] for parts, kl in self._measured]
        pull = PULL * np.eye(len(axes))
        left = np.array([*rows, *pull])
        right = np.array([1.0] * len(rows) + [PULL] * len(axes))
        found = lsq_linear(left, right, bounds=FACTORS).x
        return {axis: round(float(value), 6) for axis, value in zip(axes, found, strict=True)}


def uniform(space: Space, limits: Mapping[str, float]) -> dict[str, Plan]:
    """Name -> the plan that sets one field to one value in all layers and is within the limits: of
    each axis the one whose parts harm least. Where none is within, the least harmful of two axes
    at once."""
    return _least_harmful(every_uniform(space), space, limits) or _least_harmful(
        (("two axes", name, plan) for name, plan in every_pair(space)), space, limits
    )


def _least_harmful(
    plans: Iterable[tuple[str, str, Plan]], space: Space, limits: Mapping[str, float]
) -> dict[str, Plan]:
    """Name -> plan, of each axis the one within the limits whose parts harm least; of (axis, name,
    plan)."""
    best: dict[str, tuple[float, str, Plan]] = {}
    for axis, name, plan in plans:
        if within(space, plan, limits):
            harm = sum(space.catalog.by_axis(plan, space.parent).values())
            if axis not in best or harm < best[axis][0]:
                best[axis] = (harm, name, plan)
    return {name: plan for _, name, plan in best.values()}


def every_pair(space: Space) -> Iterator[tuple[str, Plan]]:
    """(name, plan) of two uniform plans at once, of two axes, where every layer can have both."""
    for (axis, name, one), (other_axis, other_name, other) in combinations(every_uniform(space), 2):
        both = one.also(other, space.parent)
        if axis != other_axis and both is not None and space.allows(both):
            yield f"{name}, {other_name.removeprefix('uniform ')}", both


def every_uniform(space: Space):
    """(axis, name, plan) of what one would do without a search: one value in all layers, formats
    with their own options."""
    plain = [one for one in FORMATS if "(" not in one]
    told = {"kv_heads": "{} K/V heads", "ffn": "FFN {}", "latent": "latents of {}"}
    told |= dict.fromkeys(WEIGHTS, "weights {}")
    for name in FIELDS:
        if name == "attention_weights":
            continue
        ladders = [ladder.get(name, []) for ladder in space.ladders]
        for value in [one for one in ladders[0] if all(one in other for other in ladders)]:
            if value == 0 or (name == "cache" and value not in plain):
                continue
            plan = space.parent.with_field(name, value)
            if name == "ffn_weights":
                plan = plan.with_field("attention_weights", value)
            if any((i, n, v) not in space.catalog.harm for i, n, v in plan.changes(space.parent)):
                continue  # a form that not all of its matrices can have
            words = told.get(name, f"{name} {{}}").format(value)
            yield axis_of(name, value), f"uniform {words}", plan


def within(space: Space, plan: Plan, limits: Mapping[str, float]) -> bool:
    """Whether a plan is within all limits."""
    totals = space.ledger.totals(plan)
    if STEP in limits:
        totals[STEP] = 1000 * space.ledger.batch / space.step_ms(plan)
    return all(meets(row, totals[row], limit) for row, limit in limits.items())
