"""How many weights go, and which of them are the lowest: exact counts, unstructured or N of every
M.

    # half of the weights of every matrix, exactly
    Sparsity.parse(0.5)
    # 2 of every 4 consecutive inputs of an output, as sparse tensor cores want them
    Sparsity.parse("2:4")

R: rows, outputs of a weight; C, n: entries of a row, inputs; m: entries of a group.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# groups up to this size are ranked by comparing all pairs, which beats sorting many short rows
PAIRWISE = 16


@dataclass(frozen=True)
class Sparsity:
    """`share` of the weights are pruned; with `n` and `m`, n of every m consecutive inputs of each
    output.
    """

    share: float
    n: int | None = None
    m: int | None = None

    @classmethod
    def parse(cls, spec: float | str | Sparsity, argument: str = "sparsity") -> Sparsity:
        """A share from 0 to 1 (a number or its text) or "N:M": N zeros in every M weights.
        ValueError for others.
        """
        if isinstance(spec, Sparsity):
            return spec
        pattern = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", spec) if isinstance(spec, str) else None
        if pattern:
            n, m = map(int, pattern.groups())
            if m < 1 or n > m:
                raise ValueError(
                    f"{argument}: got {spec!r}, valid is N:M with N zeros in every M weights, N "
                    "from 0 to M"
                )
            return cls(n / m, n, m)
        try:
            share = float("nan") if isinstance(spec, bool) else float(spec)
        except (TypeError, ValueError):
            share = math.nan
        if not 0 <= share <= 1:
            raise ValueError(
                f"{argument}: got {spec!r}, valid is a share from 0 to 1, or N:M like '2:4'"
            )
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
            raise ValueError(
                f"sparsity: {self} needs inputs in groups of {self.m}, {name} has {inputs}"
            )


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks exactly `count` entries of every row of scores (R, n), fp32 or fp64: the lowest, of
    equal ones the first.

    Bool (R, n).
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count == scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    # everything up to the count-th lowest, and only where several are equal to it, the first of
    # those
    threshold = _kth_lowest(scores, count)
    mask = scores <= threshold
    if bool((mask.sum(-1) > count).any()):  # several at the threshold
        mask, tied = scores < threshold, scores == threshold
        mask |= tied & (tied.cumsum(-1) <= count - mask.sum(-1, keepdim=True))
    return mask


def _kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The count-th lowest of every row of scores (R, n): (R, 1)."""
    if scores.device.type == "cpu":  # numpy's partition is vectorised: 12 times as fast as kthvalue
        order = np.partition(scores.numpy(), count - 1, axis=-1)
        return torch.from_numpy(order[:, count - 1 : count])
    return scores.kthvalue(count, dim=-1, keepdim=True).values


def lowest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Marks the n lowest of every m consecutive entries of each row of scores (R, C), C % m == 0.
    Bool (R, C).
    """
    groups = scores.view(-1, m).T.contiguous()  # (m, groups)
    return lowest_first(groups, n).T.reshape(scores.shape)


def lowest_first(scores: Tensor, n: int) -> Tensor:
    """Marks the n lowest of every column of scores (m, columns); of equal ones the first. Bool (m,
    columns).
    """
    m = scores.shape[0]
    if m > PAIRWISE:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        return mask.scatter_(0, scores.argsort(dim=0, stable=True)[:n], True)
    # SparseGPT asks for it a thousand times a layer: this takes a quarter of the time
    if (n, m) == (2, 4):
        mask = scores <= _second_of_four(scores)
        if int(mask.count_nonzero()) == n * scores.shape[1]:  # none is tied with it
            return mask
    first, second, rank, start = _pairs(m, scores.device)
    # of equal ones the later ranks higher
    above = scores.index_select(0, first) <= scores.index_select(0, second)
    return torch.addmm(start, rank, above.float()) < n


def _second_of_four(scores: Tensor) -> Tensor:
    """(4, columns) -> (columns,)"""
    low, high = scores[:2].minimum(scores[2:]), scores[:2].maximum(scores[2:])
    return low[0].maximum(low[1]).minimum(high[0].minimum(high[1]))


@cache
def _pairs(m: int, device: torch.device) -> tuple[Tensor, ...]:
    """All pairs i < j of m entries, and what they say of ranks: the matrix (m, pairs) that counts
    for each entry how often it is above, as j, less how often it is not below, as i; and the
    entries after it (m, 1), where counting starts. Few calls: it is their number that takes the
    time."""
    first, second = torch.triu_indices(m, m, 1, device=device)
    place = torch.arange(m, device=device)[:, None]
    return (
        first,
        second,
        (place == second).float() - (place == first).float(),
        (m - 1.0 - place).float(),
    )


def lowest_per_row(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """The mask of a method that compares the weights of an output (a row) only with each other.
    scores (R, C).

    Rows get equally many, or one more, so that the whole matrix has exactly `sparsity.count(R *
    C)`."""
    if sparsity.n is not None and sparsity.m is not None:
        return lowest_of_groups(scores, sparsity.n, sparsity.m)
    rows, columns = scores.shape
    # whole numbers that add up: row r gets what lies between r and r + 1 shares of the whole
    ends = torch.arange(rows + 1) * sparsity.count(rows * columns) // rows
    counts = ends.diff()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for count in counts.unique().tolist():
        mine = (counts == count).to(scores.device)
        mask[mine] = lowest(scores[mine], count)
    return mask
