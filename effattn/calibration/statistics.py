"""Second moments of attention, streamed: what head conversion knows about its data.

D: hidden size; K: key/value heads; r: query heads of each; G: any heads; d: size of a head. A map
(d, D + 1) is a projection with its bias as last column, and acts on (x, 1)."""

from __future__ import annotations

import torch

from effattn.hf.anatomy import Layer

ROWS = 1024  # of half precision that are summed in fp32


class SecondMoment:
    """E[a b^T] over all rows seen, in fp64. Rows come in any number of pieces; memory is one
    matrix.

    a (n, A) and b (n, B); with `ones=True` a 1 is appended to a (and to b when it is the same),
    which carries the biases."""

    def __init__(self, ones: bool = False):
        self.ones, self.rows = ones, 0
        self.total: torch.Tensor | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor | None = None) -> None:
        """Adds rows a (N, d) and b (N, d'), None for a itself, to the sum of a^T b."""
        others = a if b is None else b
        # Products of two numbers of half precision are exact in fp32, in which they cost half of
        # what they do in fp64; the sums over `ROWS` of them are off by some 1e-7 of the largest.
        half = all(x.dtype in (torch.bfloat16, torch.float16) for x in (a, others))
        dtype, rows = (torch.float32, ROWS) if half else (torch.float64, max(1, len(a)))
        for x, y in zip(a.split(rows), others.split(rows), strict=True):
            left = self._extend(x.to(dtype))
            product = (left.T @ (left if b is None else y.to(dtype))).double()
            self.total = product if self.total is None else self.total.add_(product)
        self.rows += len(a)

    def _extend(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self.ones else x

    @property
    def mean(self) -> torch.Tensor:
        """E[a^T b] over the rows so far, fp64; there has to be one."""
        return self.sum / self.rows

    @property
    def sum(self) -> torch.Tensor:
        """The sum of a^T b over the rows so far, fp64; there has to be one."""
        assert self.total is not None
        return self.total


def head_covariance(weights: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """E[(w x)(w x)^T] for stacked head maps: weights (G, d, D + 1), moment (D + 1, D + 1) -> (G·d,
    G·d).
    """
    flat = weights.reshape(-1, weights.shape[-1])
    return flat @ moment @ flat.T


def query_energy(layer: Layer, moment: torch.Tensor) -> torch.Tensor:
    """E[q q^T] summed over the query heads that share a KV head: (K, d, d), before RoPE. moment
    (D + 1, D + 1): of the attention module's inputs with a 1 behind them."""
    q = layer.q.with_bias.view(layer.kv_heads, -1, layer.head_dim, moment.shape[0])
    return torch.einsum("krdi,ij,krej->kde", q, moment, q)
