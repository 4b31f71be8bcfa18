"""SparseGPT as the paper writes it (arXiv:2301.00774, algorithm 1), slow and obvious: what tests
and benchmarks hold `sparsegpt` to. Three factorisations, one column and one update of all later
columns at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.calibration.hessian import DAMPING
from effattn.prune.unstructured.methods.sparsegpt import BLOCK
from effattn.prune.unstructured.nm import Sparsity


def sparsegpt_reference(
    weight: Tensor,
    hessian: Tensor,
    sparsity: Sparsity | float | str,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Tensor:
    """weight (outputs, inputs) pruned for H = hessian (inputs, inputs), as `sparsegpt` does it. Use
    fp64.
    """
    weight, sparsity = weight.clone(), Sparsity.parse(sparsity)
    columns = weight.shape[1]
    damped = hessian + damping * hessian.diagonal().diag()
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
    )
    diagonal, mask = factor.diagonal(), torch.zeros_like(weight, dtype=torch.bool)
    for i in range(columns):
        if sparsity.m is None and i % block == 0:
            inside = slice(i, i + block)
            scores = (weight[:, inside] / diagonal[inside]).square()
            mask[:, inside] = (
                scores <= scores.flatten().kthvalue(sparsity.count(scores.numel())).values
            )
        if sparsity.m is not None and i % sparsity.m == 0:
            group = slice(i, i + sparsity.m)
            scores = (weight[:, group] / diagonal[group]).square()
            mask[:, group] = scores.argsort(1).argsort(1) < sparsity.n
        error = torch.where(mask[:, i], weight[:, i], 0) / diagonal[i]
        weight[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        weight[:, i].masked_fill_(mask[:, i], 0)
    return weight
