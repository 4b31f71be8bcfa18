"""The plan of least harm within all limits: a multiple-choice integer program, solved to proven
optimality by HiGHS (scipy's `milp`).

    solution = solve(groups, limits)
    solution.picks            # one option a group

One option is picked of each group; harms add up, and so does what options cost in each row. Rows
are upper limits: a lower one is its negative.

G: groups; n: options of all groups together; R: rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effattn.errors import Unsupported

SCALE = 1e3  # what the best harm is scaled to: HiGHS takes gaps below 1e-6 for none
ROUNDS = 8


@dataclass(frozen=True)
class Option:
    """One thing that a group may become. harm: nats a token; costs: row -> what it takes; value:
    what it means to the caller."""

    harm: float
    costs: Mapping[str, float]
    value: Any = None


@dataclass(frozen=True)
class Solution:
    """picks: the place of each group's option; harm: their sum; bound: no choice is below it."""

    picks: tuple[int, ...]
    harm: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from proven optimal it is, as a share of its harm: 0 is proven."""
        return max(0.0, self.harm - self.bound) / self.harm if self.harm > 0 else 0.0


@dataclass
class Problem:
    """Groups of options, row -> the most that all may take, and picks that are not to be found
    again, each with the number of groups in which a solution has to differ from it."""

    groups: Sequence[Sequence[Option]]
    limits: Mapping[str, float]
    excluded: list[tuple[Sequence[int], int]] = field(default_factory=list)


def solve(problem: Problem) -> Solution | None:
    """The solution of least harm; None where there is none. Raises Unsupported without scipy."""
    floor = [min(one.harm for one in group) for group in problem.groups]
    # First with what harm there is, and then, since tolerances of a solver are absolute, again
    # with the harm that was found as the measure: whatever harms more on its own is left out.
    found = _solve(problem, floor, np.inf, 1.0)
    for _ in range(ROUNDS):
        if found is None:
            return None
        above = found.harm - sum(floor)
        if above <= 0:
            return found
        again = _solve(problem, floor, above, SCALE / above)
        if again is None or again.harm >= found.harm * (1 - 1e-9):
            return found if again is None else min(again, found, key=lambda one: one.harm)
        found = again
    return found


def _solve(problem: Problem, floor: list[float], most: float, scale: float) -> Solution | None:
    """One call of the solver. floor: the least harm of each group, which is left out of the
    objective; most: above it, of a single option."""
    milp, constraint, bounds, sparse = _scipy()
    names = [(g, i) for g, group in enumerate(problem.groups) for i in range(len(group))]
    options = [problem.groups[g][i] for g, i in names]
    harm = np.array([one.harm - floor[g] for (g, _), one in zip(names, options, strict=True)])
    place = {name: column for column, name in enumerate(names)}
    choice = sparse.csr_matrix(
        (np.ones(len(names)), ([g for g, _ in names], range(len(names)))),
        shape=(len(problem.groups), len(names)),
    )
    rows = [constraint(choice, 1, 1)]
    for row, limit in problem.limits.items():
        costs = np.array([one.costs[row] for one in options], dtype=float)
        size = max(1.0, np.abs(costs).max())
        rows.append(constraint(costs[None] / size, -np.inf, limit / size))
    for picks, differ in problem.excluded:
        same = np.zeros(len(names))
        same[[place[pair] for pair in enumerate(picks)]] = 1
        rows.append(constraint(same[None], -np.inf, len(picks) - differ))
    allowed = bounds(0, (harm <= most * (1 + 1e-12)).astype(float))
    result = milp(
        harm * scale,
        constraints=rows,
        bounds=allowed,
        integrality=np.ones(len(names)),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    chosen = [name for name, value in zip(names, result.x, strict=True) if value > 0.5]
    picks = tuple(i for _, i in sorted(chosen))
    least = sum(floor)
    total = sum(problem.groups[g][i].harm for g, i in enumerate(picks))
    bound = result.mip_dual_bound
    bound = total if bound is None else bound / scale + least
    return _checked(problem, Solution(picks, total, min(bound, total)))


def _checked(problem: Problem, solution: Solution) -> Solution | None:
    """The solution, if it is within the limits to the byte; otherwise the best beside it: the
    solver's feasibility has a tolerance, bytes have none."""
    for row, limit in problem.limits.items():
        used = sum(problem.groups[g][i].costs[row] for g, i in enumerate(solution.picks))
        if used > limit:
            others = [*problem.excluded, (solution.picks, 1)]
            return solve(Problem(problem.groups, problem.limits, others))
    return solution


def undominated(options: Sequence[Option]) -> list[Option]:
    """Without those that another beats or equals in harm and in every row: no optimum needs them.
    Of equal ones the first stays."""
    ordered = sorted(options, key=lambda one: (one.harm, *(one.costs.values())))
    kept: list[Option] = []
    for one in ordered:
        if not any(_beats(other, one) for other in kept):
            kept.append(one)
    return kept


def _beats(one: Option, other: Option) -> bool:
    return one.harm <= other.harm and all(
        cost <= other.costs[row] for row, cost in one.costs.items()
    )


def _scipy():
    try:
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise Unsupported(
            f"fit: scipy, whose solver finds the plan, cannot be imported ({error}); pip install "
            "scipy"
        ) from None
    return milp, LinearConstraint, Bounds, sparse
