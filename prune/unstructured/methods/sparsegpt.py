"""SparseGPT: prune a linear layer, and let the weights that stay make up for those that go.

Optimal Brain Surgeon for every output at once, column by column in a fixed order, so that all
outputs share the inverse Hessians (Frantar and Alistarh, arXiv:2301.00774, algorithm 1). Work is on
the transposed weights: a column is then contiguous in memory. Updates are lazy twice: within
`PANEL` columns they are products of a column and a row, within a block and beyond it products of
matrices.

c: columns of a block; U: the upper Cholesky factor of the damped inverse Hessian. Pruning column i
of W costs (w_i / U_ii)^2 an output and changes the columns j > i by -(w_i / U_ii) U_ij."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.calibration.hessian import DAMPING, Hessian, InverseHessian
from effattn.prune.unstructured.methods.base import Method, Needs, Options, register
from effattn.prune.unstructured.nm import Sparsity, lowest, lowest_first

BLOCK = 128  # columns whose mask is chosen at once, and after which the columns to come are updated
PANEL = 16  # columns that are updated one by one


@register
class SparseGPT(Method):
    """Needs second moments, and changes what stays. Its statistics are an `InverseHessian`."""

    name, needs, updates = "sparsegpt", Needs.MOMENTS, True
    source = "arXiv:2301.00774"

    def prepare(self, seen: Hessian, name: str, options: Options) -> InverseHessian:
        assert seen.mean is not None  # a layer that saw nothing has been refused
        return InverseHessian.of(seen.mean, options.damping, name, options.raise_damping)

    def prune(
        self,
        weight: Tensor,
        statistics: InverseHessian,
        sparsity: Sparsity,
        name: str,
        options: Options,
    ) -> tuple[Tensor, dict]:
        done = sparsegpt(weight, statistics, sparsity, block=options.block, name=name)
        return done.weight, {"loss": done.loss, "damping": done.damping}


@dataclass(frozen=True)
class Pruned:
    """`weight` (outputs, inputs) in the dtype it had, and `mask` (bool, True: pruned); both are
    transposed views.

    `loss`: the squared output error, the sum over pruned weights of (w / U_ii)^2; it equals tr(E (H
    + damping) E^T) for E = W - W'. `damping`: as used."""

    weight: Tensor
    mask: Tensor
    loss: float
    damping: float


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor | InverseHessian,
    sparsity: Sparsity | float | str,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
    raise_damping: bool = False,
    name: str = "weight",
) -> Pruned:
    """Prunes weight (outputs, inputs) for inputs with H = `hessian` (inputs, inputs), a multiple of
    the sum of x x^T.

    Unstructured, exactly `sparsity.count` weights go, evenly by blocks of `block` columns and
    freely inside of one. Inputs that are always 0 are pruned first. An `InverseHessian` serves
    several layers with the same input, and has its damping. Raises LinAlgError, naming `name`, when
    the factorisation fails."""
    sparsity = Sparsity.parse(sparsity)
    sparsity.check_inputs(weight.shape[1], name)
    if block < 1:
        raise ValueError(f"block: got {block}, valid is a positive number of columns")
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(hessian, Tensor):
        hessian = InverseHessian.of(hessian.to(work), damping, name, raise_damping)
    columns = weight.detach().T.to(work, memory_format=torch.contiguous_format, copy=True)
    mask, loss = prune_columns(columns, hessian.factor, sparsity, block, hessian.dead)
    return Pruned(columns.T.to(weight.dtype), mask.T, loss, hessian.damping)


def prune_columns(
    columns: Tensor, factor: Tensor, sparsity: Sparsity, block: int, dead: Tensor
) -> tuple[Tensor, float]:
    """The column loop. columns (inputs, outputs), the transposed weights, are pruned in place;
    factor is U.

    Returns the mask (inputs, outputs) and the loss.
    """
    inputs, outputs = columns.shape
    if sparsity.m is not None:
        block = max(1, block // sparsity.m) * sparsity.m  # a group is never cut
    mask = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    # 1 / U_ii^2; an input that was always 0 costs nothing, so that its weights go first
    importance = factor.diagonal().pow(-2).masked_fill_(dead, 0)[:, None]
    loss = columns.new_zeros((), dtype=torch.float64)
    done = 0
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        inside, chosen = columns[start:stop], mask[start:stop]
        triangle = factor[start:stop, start:stop]
        if sparsity.m is None:
            scores = inside.square().mul_(importance[start:stop])
            # Counted from the start, so that rounding never adds up over the blocks.
            until = sparsity.count(stop * outputs)
            chosen.copy_(lowest(scores.view(1, -1), until - done).view(inside.shape))
            done = until
        errors = _prune_block(inside, triangle, chosen, importance[start:stop], sparsity)
        # Columns to come make up for the whole block in one product of matrices.
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.square_().sum(1).sum(dtype=torch.float64)
    return mask, float(loss)


def _prune_block(
    inside: Tensor, factor: Tensor, mask: Tensor, importance: Tensor, sparsity: Sparsity
) -> Tensor:
    """Prunes one block of columns (c, outputs) in place, by `mask`, which N:M fills as it goes;
    returns the errors.

    errors[i] = (w_i - q_i) / U_ii, where q_i is the column as it will be: what later columns are
    corrected by."""
    n, m = sparsity.n, sparsity.m
    width = PANEL if m is None else m * max(1, PANEL // m)
    errors, inverse = torch.empty_like(inside), 1 / factor.diagonal()[:, None]
    # the share of a column that becomes its error: 0 or 1/U_ii
    share = mask * inverse if m is None else torch.empty_like(inside)
    # Views of all columns, made once: the loop below runs once a column.
    columns, shares, becoming = inside.unbind(), share.unbind(), errors.unbind()
    below = factor.unsqueeze(-1)
    groups = [x.split(m or len(inside)) for x in (inside, importance, mask, inverse, share)]
    for first in range(0, len(inside), width):
        last = min(first + width, len(inside))
        for i in range(first, last):
            if m is not None and i % m == 0:
                own, weights, chosen, scales, shared = (x[i // m] for x in groups)
                chosen.copy_(lowest_first(own.square().mul_(weights), n))
                torch.mul(chosen, scales, out=shared)
            torch.mul(columns[i], shares[i], out=becoming[i])
            if i + 1 < last:
                inside[i + 1 : last].addcmul_(below[i, i + 1 : last], becoming[i], value=-1)
        inside[last:].addmm_(factor[first:last, last:].T, errors[first:last], alpha=-1)
    zero = inside.new_zeros(()).expand_as(inside)
    torch.addcmul(zero, inside, (~mask).to(inside.dtype), out=inside)  # the sum makes 0 of -0
    return errors
