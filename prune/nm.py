"""How many weights go, and which of them are the lowest: exact counts, unstructured or N of every M.

Sparsity.parse(0.5)        # half of the weights of every matrix, exactly
Sparsity.parse("2:4")      # 2 of every 4 consecutive inputs of an output, as sparse tensor cores want them
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAIRWISE = 16  # groups up to this size are ranked by comparing all pairs, which beats sorting many short rows


@dataclass(frozen=True)
class Sparsity:
    """`share` of the weights are pruned; with `n` and `m`, n of every m consecutive inputs of each output."""

    share: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, spec: float | str | Sparsity, argument: str = "sparsity") -> Sparsity:
        """A share from 0 to 1 (a number or its text) or "N:M": N zeros in every M weights. ValueError for others."""
        if isinstance(spec, Sparsity):
            return spec
        pattern = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", spec) if isinstance(spec, str) else None
        if pattern:
            n, m = map(int, pattern.groups())
            if m < 1 or n > m:
                raise ValueError(
                    f"{argument}: got {spec!r}, valid is N:M with N zeros in every M weights, N from 0 to M"
                )
            return cls(n / m, n, m)
        try:
            share = float("nan") if isinstance(spec, bool) else float(spec)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 <= share <= 1:
            raise ValueError(f"{argument}: got {spec!r}, valid is a share from 0 to 1, or N:M like '2:4'")
        return cls(share)

    def __str__(self) -> str:
        return f"{self.share:g}" if self.m is None else f"{self.n}:{self.m}"

    @property
    def label(self) -> str:
        """As people write it: "50 %", "2:4"."""
        return f"{100 * self.share:.4g} %" if self.m is None else str(self)

    def count(self, weights: int) -> int:
        """How many of `weights` are pruned: the nearest whole number."""
        return math.floor(self.share * weights + 0.5)

    def check_inputs(self, inputs: int, name: str) -> None:
        """ValueError, naming the matrix, when its rows cannot be cut into groups of M."""
        if self.m is not None and inputs % self.m:
            raise ValueError(f"sparsity: {self} needs inputs in groups of {self.m}, {name} has {inputs}")


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks exactly `count` entries of every row of scores (R, n), fp32 or fp64: the lowest, of equal ones the first.

    Bool (R, n).
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count == scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_lowest(scores, count)
    mask, tied = scores < threshold, scores == threshold
    missing = count - mask.sum(-1, keepdim=True)
    if bool((tied.sum(-1, keepdim=True) > missing).any()):
        tied &= tied.cumsum(-1) <= missing
    return mask.logical_or_(tied)


def _kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The count-th lowest of every row of scores (R, n): (R, 1)."""
    if scores.device.type == "cpu":  # numpy's partition is vectorised: 12 times as fast as kthvalue
        order = np.partition(scores.numpy(), count - 1, axis=-1)
        return torch.from_numpy(order[:, count - 1 : count])
    return scores.kthvalue(count, dim=-1, keepdim=True).values


def lowest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Marks the n lowest of every m consecutive entries of each row of scores (R, C), C % m == 0. Bool (R, C)."""
    groups = scores.view(-1, m).T.contiguous()  # (m, groups)
    return lowest_first(groups, n).T.reshape(scores.shape)


def lowest_first(scores: Tensor, n: int) -> Tensor:
    """Marks the n lowest of every column of scores (m, columns); of equal ones the first. Bool (m, columns)."""
    m = scores.shape[0]
    if m > PAIRWISE:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.scatter_(0, scores.argsort(dim=0, stable=True)[:n], True)
    rank = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
    for i in range(1, m):  # each pair once: the later of two equal ones ranks higher
        above = scores[:i] <= scores[i]
        rank[i] += above.sum(0, dtype=torch.int8)
        rank[:i] += ~above
    return rank < n


def lowest_per_row(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """The mask of a method that compares the weights of an output (a row) only with each other. scores (R, C).

    Rows get equally many, or one more, so that the whole matrix has exactly `sparsity.count(R * C)`.
    """
    if sparsity.m is not None:
        return lowest_of_groups(scores, sparsity.n, sparsity.m)
    rows, columns = scores.shape
    ends = torch.arange(rows + 1) * sparsity.count(rows * columns) // rows
    counts = ends.diff()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for count in counts.unique().tolist():
        mine = (counts == count).to(scores.device)
        mask[mine] = lowest(scores[mine], count)
    return mask
