"""The whole curve: the best plan at each of many budgets, beside the best uniform one."""

from __future__ import annotations

from collections.abc import Callable

from effattn.fitting.groups import Space
from effattn.fitting.search import Measure, search

ROUNDS = 3
CHOSEN = ("taken", "kl", "perplexity", "plan")  # what a row says of its plan


def points(
    space: Space,
    measure: Measure,
    count: int,
    row: str = "bytes",
    *,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """`count` budgets of `row`, evenly from the smallest plan to just below the parent: rows of
    {limit, taken (by the plan, of the row), kl, perplexity, plan, uniform, best_uniform}.
    A plan that was best for less is a plan for more: the curve never rises."""
    least = space.least(row)
    parent = space.ledger.totals(space.parent)[row]
    found: list[dict] = []
    for number in range(count):
        limit = least + (parent - least) * number / count
        one = search(space, {row: limit}, measure, rounds=rounds)
        best, uniform = one.best, min(one.baselines, key=lambda tried: tried.kl, default=None)
        if found and found[-1]["kl"] < best.kl:
            chosen = {name: found[-1][name] for name in CHOSEN}
        else:
            taken = space.ledger.totals(best.plan)[row]
            perplexity = measure(best.plan)["perplexity"]
            values = (taken, best.kl, perplexity, best.plan.to_dicts())
            chosen = dict(zip(CHOSEN, values, strict=True))
        found.append(
            {
                "limit": limit,
                **chosen,
                "uniform": uniform.name if uniform else None,
                "best_uniform": uniform.kl if uniform else None,
            }
        )
        if progress:
            progress(number + 1, count)
    return found
