"""Which heads share a key/value head: neighbours, as in every GQA checkpoint, or the most alike.

Grouping by similarity permutes heads before merging. The permutation changes nothing by itself (query rows,
output columns and per-head norms move along), but lets alike heads meet. Gains are small; it comes last.
"""

from __future__ import annotations

from itertools import combinations

import torch

from effattn.heads.methods import Heads, Method, relative_errors

GROUPINGS = ("contiguous", "similarity")


def contiguous(heads: int, groups: int) -> list[list[int]]:
    """Head h goes to group h // (heads / groups), which is what `repeat_kv` expects."""
    size = heads // groups
    return [list(range(g * size, (g + 1) * size)) for g in range(groups)]


def by_similarity(heads: Heads, groups: int, method: Method) -> list[list[int]]:
    """Balanced groups that lose little: swaps between groups, from the contiguous start, as long as they
    lower the sum over all pairs inside groups of what merging that pair loses (keys plus values)."""
    count = len(heads.keys)
    loss = torch.zeros(count, count, dtype=torch.float64)
    for a, b in combinations(range(count), 2):
        pair = heads.select([a, b])
        loss[a, b] = loss[b, a] = sum(relative_errors(pair, method(pair)))
    result = contiguous(count, groups)
    group_of = {head: g for g, members in enumerate(result) for head in members}
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(count), 2):
            ga, gb = result[group_of[a]], result[group_of[b]]
            if ga is gb:
                continue
            others_a, others_b = [h for h in ga if h != a], [h for h in gb if h != b]
            before = loss[a, others_a].sum() + loss[b, others_b].sum()
            after = loss[b, others_a].sum() + loss[a, others_b].sum()
            if after < before - 1e-12:
                ga[ga.index(a)], gb[gb.index(b)] = b, a
                group_of[a], group_of[b] = group_of[b], group_of[a]
                improved = True
    return sorted(sorted(members) for members in result)
