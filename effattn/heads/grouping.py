"""Which heads share a key/value head: neighbours, as in every GQA checkpoint, or the most alike.

Grouping by similarity permutes heads before merging. The permutation changes nothing by itself
(query rows, output columns and per-head norms move along), but lets alike heads meet. Gains are
small; it comes last."""

from __future__ import annotations

from itertools import combinations

import torch

from effattn.heads.methods.base import Heads, Method, relative_errors

GROUPINGS = ("contiguous", "similarity")


def contiguous(heads: int, groups: int) -> list[list[int]]:
    """Head h goes to group h // (heads / groups), which is what `repeat_kv` expects."""
    size = heads // groups
    return [list(range(g * size, (g + 1) * size)) for g in range(groups)]


def by_similarity(heads: Heads, groups: int, method: Method) -> list[list[int]]:
    """Balanced groups that lose little: the sum over all pairs inside groups of what merging that
    pair loses (keys plus values), lowered by swaps from two starts, neighbours and
    most-alike-first."""
    count = len(heads.keys)
    loss = torch.zeros(count, count, dtype=torch.float64)
    for a, b in combinations(range(count), 2):
        pair = heads.select([a, b])
        loss[a, b] = loss[b, a] = sum(relative_errors(pair, method(pair)))

    def total(result: list[list[int]]) -> float:
        return sum(float(loss[a, b]) for members in result for a, b in combinations(members, 2))

    starts = (contiguous(count, groups), _most_alike_first(loss, groups))
    best = min((_swapped(start, loss) for start in starts), key=total)
    return sorted(sorted(members) for members in best)


def _most_alike_first(loss: torch.Tensor, groups: int) -> list[list[int]]:
    """Greedy groups: the closest free pair, then whichever free head adds least, until the group is
    full.
    """
    free, result = set(range(len(loss))), []
    for _ in range(groups):
        members = list(
            min(
                combinations(sorted(free), 2),
                key=lambda pair: float(loss[pair]),
                default=tuple(free),
            )
        )
        members = members[: len(loss) // groups]
        free -= set(members)
        while len(members) < len(loss) // groups:
            nearest = min(free, key=lambda head: float(loss[head, members].sum()))
            members.append(nearest)
            free.remove(nearest)
        result.append(members)
    return result


def _swapped(groups: list[list[int]], loss: torch.Tensor) -> list[list[int]]:
    """Swaps heads between groups for as long as that lowers the loss."""
    result = [list(members) for members in groups]
    group_of = {head: g for g, members in enumerate(result) for head in members}
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(len(loss)), 2):
            ga, gb = result[group_of[a]], result[group_of[b]]
            if ga is gb:
                continue
            # only pairs with a or b change, so that a swap is judged by those
            others_a, others_b = [h for h in ga if h != a], [h for h in gb if h != b]
            before = loss[a, others_a].sum() + loss[b, others_b].sum()
            after = loss[b, others_a].sum() + loss[a, others_b].sum()
            if after < before - 1e-12:
                ga[ga.index(a)], gb[gb.index(b)] = b, a
                group_of[a], group_of[b] = group_of[b], group_of[a]
                improved = True
    return result
