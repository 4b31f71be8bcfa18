"""The whole curve: the best plan at each of many budgets, beside the best uniform one."""

from __future__ import annotations

from collections.abc import Callable

from effattn.fitting.groups import Space
from effattn.fitting.search import Measure, search

ROUNDS = 3


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
    {limit, bytes (what the plan takes of the row), kl, perplexity, best_uniform, uniform, plan}.
    A plan that was best for less is a plan for more: the curve never rises."""
    least = space.least(row)
    parent = space.ledger.totals(space.parent)[row]
    found: list[dict] = []
    for number in range(count):
        limit = least + (parent - least) * number / count
        one = search(space, {row: limit}, measure, rounds=rounds)
        best = one.best
        if found and found[-1]["kl"] < best.kl:
            found.append(found[-1] | {"limit": limit})
        else:
            uniform = min(one.baselines, key=lambda tried: tried.kl, default=None)
            found.append(
                {
                    "limit": limit,
                    "taken": space.ledger.totals(best.plan)[row],
                    "kl": best.kl,
                    "perplexity": measure(best.plan)["perplexity"],
                    "plan": best.plan.to_dicts(),
                }
            )
            found[-1] |= {
                "uniform": uniform.name if uniform else None,
                "best_uniform": uniform.kl if uniform else None,
            }
        if progress:
            progress(number + 1, count)
    return found
