"""The integer program against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from effattn.fitting.solver import Option, Problem, solve, undominated


def random_problem(seed: int) -> Problem:
    """Harms over eight powers of ten, as those of formats are; bytes of which sums meet limits
    exactly."""
    draw = random.Random(seed)
    groups = [
        [
            Option(
                10 ** draw.uniform(-8, 0) if number else 0.0,
                {
                    "bytes": draw.randint(1, 10**9) + (0 if number else 10**9),
                    "parameters": draw.randint(1, 1000),
                },
            )
            for number in range(draw.randint(1, 5))
        ]
        for _ in range(draw.randint(1, 5))
    ]
    limits = {
        row: sum(draw.choice(group).costs[row] for group in groups)
        for row in ("bytes", "parameters")
    }
    return Problem(groups, limits)


def brute_force(problem: Problem):
    """(least harm, picks), or None."""
    found = []
    for picks in itertools.product(*(range(len(group)) for group in problem.groups)):
        chosen = [group[i] for group, i in zip(problem.groups, picks, strict=True)]
        fits = all(
            sum(one.costs[row] for one in chosen) <= limit for row, limit in problem.limits.items()
        )
        differs = all(
            sum(a != b for a, b in zip(picks, other, strict=True)) >= count
            for other, count in problem.excluded
        )
        if fits and differs:
            found.append((sum(one.harm for one in chosen), picks))
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_is_better(seed):
    problem = random_problem(seed)
    best = brute_force(problem)
    found = solve(problem)
    assert (found is None) == (best is None)
    for _ in range(3):  # and without the best, the next one
        if found is None:
            break
        assert found.harm == pytest.approx(best[0], rel=1e-9)
        assert found.gap <= 1e-6
        problem.excluded.append((found.picks, 1))
        best, found = brute_force(problem), solve(problem)
        assert (found is None) == (best is None)


def test_dropping_what_is_beaten_changes_nothing():
    for seed in range(20):
        problem = random_problem(seed)
        small = Problem([undominated(group) for group in problem.groups], problem.limits)
        before, after = solve(problem), solve(small)
        assert (before is None) == (after is None)
        if before is not None:
            assert after.harm == pytest.approx(before.harm, rel=1e-9)


def test_a_limit_that_is_met_to_the_byte():
    groups = [[Option(0.0, {"bytes": 10**12 + 1}), Option(1e-7, {"bytes": 10**12})]]
    assert solve(Problem(groups, {"bytes": 10**12})).picks == (1,)
    assert solve(Problem(groups, {"bytes": 10**12 + 1})).picks == (0,)
    assert solve(Problem(groups, {"bytes": 10**12 - 1})) is None
