"""Optimal brain surgeon for whole structures: what removing one costs once the others have taken
over what they can.

With W (D, n) the output module (o_proj, or the FFN's), x its inputs, C = sum of x x^T and I = (C +
lambda diag C)^-1, removing the columns g costs tr(W_g I_gg^-1 W_g^T), which is |W_g|^2 / I_gg for a
single one, and W becomes W - W_g I_gg^-1 I_g: ZipLM (arXiv:2302.04089), equations 3 and 4, and
SlimGPT (arXiv:2412.18110). Structures are removed one after the other, a few at a time where there
are many, the cheapest first; a structure's importance is how many went before it. This is the
criterion for `compensate=True`, whose least squares it foresees: two dimensions that say the same
are worth nothing together here, and to the other criteria each as much as alone.

Nothing of I is updated but what is asked for. With I_gg = L L^T as it is when g goes, I becomes I -
V_g^T V_g for V_g = L^-1 I_g: the rows V are kept, and the rows of I that the next step needs are
made of them (an incomplete Cholesky factorisation with pivots). Removing r of n columns then takes
r^2 n operations beside the inverse, not r n^2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effattn.damping import damped
from effattn.hf.anatomy import Anatomy, Layer
from effattn.prune.structural.criteria.base import (
    Importance,
    Sums,
    criterion,
    forward,
    watching,
    watching_blocks,
)
from effattn.prune.structural.criteria.flap import output_weight

DAMPING = 0.01  # lambda
ROUNDS = 256  # at most


@criterion("obs", ("heads", "ffn"), place=20, stops=True)
@torch.no_grad()
def score(
    parts: Anatomy,
    batches: list[Tensor],
    targets: list[str],
    seed: int,
    removed: Mapping[str, int],
) -> Importance:
    """One forward pass; per layer and target a matrix (n, n) in fp64 is held. removed: target ->
    how many will go; where it says nothing, all are put in order."""
    sums = Sums(parts)

    def see(target: str, layer: Layer, x: Tensor) -> None:
        if target in targets:
            x = x.detach().flatten(0, -2).float()
            sums.add(target, layer.index, x.T @ x)

    with watching(parts, see), watching_blocks(parts):
        for _ in forward(parts, batches):
            pass
    for (target, index), gram in list(sums.total.items()):
        layer = parts.layers[index]
        # a K/V head with its query heads
        size = len(gram) // layer.kv_heads if target == "heads" else 1
        order = removal_order(gram, output_weight(layer, target), size, removed.get(target))
        place = torch.empty(len(order), dtype=torch.float64)
        place[order] = torch.arange(len(order), dtype=torch.float64)
        sums.total[target, index] = place
    return sums.importance()


def removal_order(
    gram: Tensor, weight: Tensor, size: int = 1, removed: int | None = None
) -> Tensor:
    """Structures from the cheapest on, int64 (n / size,). gram (n, n) and weight (D, n), fp64; a
    structure is `size` columns that lie beside each other. removed: how many are put in order
    (None: all); the others follow by what each would cost next."""
    count = len(gram) // size
    removed, many = count if removed is None else removed, -(-count // ROUNDS)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, DAMPING)))
    # (n, D); what is always 0 costs nothing
    columns = weight.T.masked_fill((gram.diagonal() == 0)[:, None], 0).contiguous()
    own = _own_blocks(inverse, size)
    rows, done = inverse.new_empty(removed * size, len(gram)), 0  # V
    alive = torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    while len(order) < removed:
        gone = _cheapest(own, columns, alive)[: min(many, removed - len(order))]
        at = (gone[:, None] * size + torch.arange(size)).flatten()
        now = inverse[at].addmm_(rows[:done, at].T, rows[:done], alpha=-1)  # I_g
        lower = torch.linalg.cholesky(now[:, at])
        step = torch.linalg.solve_triangular(lower, now, upper=False)  # V_g
        rows[done : done + len(at)] = step
        done += len(at)
        taken = torch.linalg.solve_triangular(lower, columns[at], upper=False)
        columns.addmm_(step.T, taken, alpha=-1)
        step = step.view(len(at), count, size)
        own -= torch.einsum("gcd,gce->cde", step, step)
        # What is gone takes no more part; 1 keeps its block invertible.
        columns[at], own[gone] = 0, torch.eye(size).to(own)
        alive[gone] = False
        order += gone.tolist()
    return torch.tensor(order + _cheapest(own, columns, alive).tolist())


def _own_blocks(inverse: Tensor, size: int) -> Tensor:
    """I_gg of every structure g: (n / size, size, size), a copy."""
    count = len(inverse) // size
    blocks = inverse.unflatten(0, (count, size)).unflatten(2, (count, size))
    return blocks.diagonal(dim1=0, dim2=2).movedim(2, 0).clone()


def _cheapest(own: Tensor, columns: Tensor, alive: Tensor) -> Tensor:
    """The structures that are left, by tr(W_g I_gg^-1 W_g^T), the cheapest first."""
    count, size, _ = own.shape
    if size == 1:
        cost = columns.square().sum(1) / own.flatten()
    else:
        blocks = columns.view(count, size, -1)
        cost = (blocks * torch.linalg.solve(own, blocks)).sum((1, 2))
    cost.masked_fill_(~alive, torch.inf)
    return cost.sort(stable=True).indices[: int(alive.sum())]
