"""Attention dropout in the tiles of `torch_blocks`, whose letters these are: N = B * Hkv heads of
keys, G query heads each; P keys of a side; a tile has S queries, R = G * S rows of scores, L
keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .dropout import Dropout


@dataclass(frozen=True, eq=False)
class Dropped:
    """Which weights are 0: `rule`, and the numbers of queries (N, G, Tq), of keys (N, Tk) and of
    the side's (N, P)."""

    rule: Dropout
    queries: Tensor
    keys: Tensor
    side: Tensor | None

    @classmethod
    def of(cls, rule: Dropout, keys: Tensor, side: Tensor | None, kv_heads: int) -> Dropped:
        """Of keys (B, 1, Tk, 1) and a side's (B, 1, P, 1)."""
        rows, heads, tokens = rule.q.shape
        queries = rule.q.reshape(rows * kv_heads, heads // kv_heads, tokens)

        def by_head(x: Tensor) -> Tensor:
            return x.expand(-1, kv_heads, -1, -1).reshape(rows * kv_heads, -1)

        return cls(rule, queries, by_head(keys), None if side is None else by_head(side))

    def factors(self, s: Tensor, part, heads: slice, a: int, b: int) -> Tensor:
        """What the weights s (n, R, L) of queries [a, b) and a part's keys are multiplied by."""
        numbers = self.side if part.side else self.keys
        keys = numbers[heads, None, None, part.k0 : part.k1]
        kept = self.rule.kept(self.queries[heads, :, a:b, None], keys)
        return kept.view(s.shape).to(s.dtype).mul_(self.rule.factor)
