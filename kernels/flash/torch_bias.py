"""The biases of tiles, from one table by distance: views where keys lie in order, linear in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Share = tuple[slice, Tensor]  # some heads of a tile, and their biases (n or 1, G or 1, S, L)


class BiasTiles:
    """What to add to the scores of a tile, and where its gradient goes.

    table (Hq or 1, n): the bias at distances 0 .. n - 1, in the unit of the scores. In `laid` row s
    is the whole table, mirrored and shifted by s: laid[h, s, y] is the bias at distance s - y + n -
    1, so that a tile's are a rectangle."""

    def __init__(
        self, table: Tensor, problem, rows: int, kv_heads: int, groups: int, gradients: bool
    ):
        self.problem, self.kv_heads, self.groups, self.table = problem, kv_heads, groups, table
        n = table.shape[1]
        width = n + rows if problem.causal else 2 * n
        self.distance = (
            (n - 1 - torch.arange(1 - rows, width, device=table.device)).abs().clamp(max=n - 1)
        )
        # windows of the mirrored table; their order is turned round, since the first one is shifted
        # most
        laid = table[:, self.distance].unfold(1, width, 1).flip(1)
        self.laid = self._by_kv_head(laid)
        self.d_laid = torch.zeros_like(self.laid) if gradients else None
        self.d_side = torch.zeros_like(table) if gradients else None

    def _by_kv_head(self, x: Tensor) -> Tensor:
        """(Hq or 1, ...) -> (Hkv or 1, G or 1, ...)"""
        return x[:, None] if x.shape[0] == 1 else x.unflatten(0, (self.kv_heads, self.groups))

    def main(
        self, heads: slice, a: int, b: int, k0: int, k1: int, laid: Tensor | None = None
    ) -> Iterator[Share]:
        """The biases of queries [a, b) and keys [k0, k1), in pieces of `heads` (of B * Hkv)."""
        laid = self.laid if laid is None else laid
        y = self.table.shape[1] - 1 - (self.problem.first_query + a - self.problem.first_key - k0)
        found = laid[:, :, : b - a, y : y + k1 - k0]
        if laid.shape[0] == 1:
            yield slice(None), found
            return
        h = heads.start
        while h < heads.stop:  # up to the end of a row of the batch
            end = min(heads.stop, (h // self.kv_heads + 1) * self.kv_heads)
            first = h % self.kv_heads
            yield slice(h - heads.start, end - heads.start), found[first : first + end - h]
            h = end

    def side(self, heads: slice, a: int, b: int, p0: int, p1: int) -> Iterator[Share]:
        """The same for keys of the side at positions [p0, p1)."""
        yield slice(None), self.table.flatten()[self._side_index(heads, a, b, p0, p1)]

    def add_main(self, ds: Tensor, heads: slice, a: int, b: int, k0: int, k1: int) -> None:
        """Adds gradients ds (n, G, S, L)."""
        for at, d_bias in self.main(heads, a, b, k0, k1, self.d_laid):
            d_bias += ds[at].sum_to_size(d_bias.shape)

    def add_side(self, ds: Tensor, heads: slice, a: int, b: int, p0: int, p1: int) -> None:
        """Adds a tile's gradient to the table's, number by number."""
        index = self._side_index(heads, a, b, p0, p1)
        self.d_side.view(-1).index_add_(0, index.flatten(), ds.flatten())

    def gradient(self) -> Tensor:
        """Of the table."""
        d_laid = self.d_laid.flatten(0, 1)
        rows, width = d_laid.shape[1:]
        mirrored = d_laid.new_zeros(len(d_laid), rows - 1 + width)
        for s in range(rows):
            mirrored[:, rows - 1 - s :][:, :width] += d_laid[:, s]
        return self.d_side.index_add(1, self.distance, mirrored)

    def _side_index(self, heads: slice, a: int, b: int, p0: int, p1: int) -> Tensor:
        """Where in the flat table, (n, G, S, P)."""
        problem, device = self.problem, self.table.device
        h = torch.arange(heads.start, heads.stop, device=device)
        start = torch.zeros_like(h) if problem.start is None else problem.start[h // self.kv_heads]
        i = torch.arange(problem.first_query + a, problem.first_query + b, device=device)[:, None]
        j = torch.arange(p0, p1, device=device)
        distance = (i - j - start[:, None, None, None]).abs().clamp(max=self.table.shape[1] - 1)
        head = (h % self.kv_heads)[:, None] * self.groups + torch.arange(self.groups, device=device)
        head = head if self.table.shape[0] > 1 else torch.zeros_like(head)
        return head[:, :, None, None] * self.table.shape[1] + distance
