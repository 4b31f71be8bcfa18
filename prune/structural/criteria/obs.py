"""Optimal brain surgeon for whole structures: what removing one costs once the others have taken
over what they can.

With W (D, n) the output module (o_proj, or the FFN's), x its inputs, C = sum of x x^T and I = (C +
lambda)^-1, removing the columns g costs tr(W_g I_gg^-1 W_g^T), which is |W_g|^2 / I_gg for a single
one, and W becomes W - W_g I_gg^-1 I_g: ZipLM (arXiv:2302.04089), equations 3 and 4, and SlimGPT
(arXiv:2412.18110). Structures are removed one after the other, a few at a time where there are
many, the cheapest first; a structure's importance is how many went before it. This is the criterion
for `compensate=True`, whose least squares it foresees: two dimensions that say the same are worth
nothing together here, and to the other criteria each as much as alone."""

from __future__ import annotations

import torch
from torch import Tensor

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

DAMPING = 0.01  # lambda, as a share of the mean diagonal of C
ROUNDS = 256  # at most


@criterion("obs", ("heads", "ffn"), place=20)
@torch.no_grad()
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """One forward pass; per layer and target a matrix (n, n) in fp64 is held."""
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
        order = removal_order(gram, output_weight(layer, target), size)
        place = torch.empty(len(order), dtype=torch.float64)
        place[order] = torch.arange(len(order), dtype=torch.float64)
        sums.total[target, index] = place
    return sums.importance()


def removal_order(gram: Tensor, weight: Tensor, size: int = 1) -> Tensor:
    """Structures from the cheapest on, int64 (n / size,). gram (n, n) and weight (D, n), fp64; a
    structure is `size` columns that lie beside each other."""
    count = len(gram) // size
    many = -(-count // ROUNDS)
    inverse = torch.linalg.inv(
        gram + (DAMPING * gram.diagonal().mean() + 1e-300) * torch.eye(len(gram)).to(gram)
    )
    weight, alive = weight.clone(), torch.ones(count, dtype=torch.bool)
    order: list[int] = []
    while len(order) < count:
        cost = _costs(inverse, weight, size).masked_fill_(~alive, torch.inf)
        gone = cost.sort(stable=True).indices[: min(many, count - len(order))]
        columns = (gone[:, None] * size + torch.arange(size)).flatten()
        # W - W_g I_gg^-1 I_g, and the inverse of what is left: I - I_:g I_gg^-1 I_g: (equation 4)
        shared = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # I_gg^-1 I_g
        weight -= weight[:, columns] @ shared
        inverse -= inverse[:, columns] @ shared
        # What is gone takes no more part; 1 keeps its block invertible.
        weight[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0
        inverse[columns, columns] = 1
        alive[gone] = False
        order += gone.tolist()
    return torch.tensor(order)


def _costs(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """tr(W_g I_gg^-1 W_g^T) of every structure g, (n / size,)."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = len(inverse) // size
    own = (
        inverse.unflatten(0, (count, size))
        .unflatten(2, (count, size))
        .diagonal(dim1=0, dim2=2)
        .movedim(2, 0)
    )
    blocks = weight.unflatten(1, (count, size)).movedim(1, 0)  # (count, D, size)
    return (blocks * torch.linalg.solve(own, blocks.mT).mT).sum((1, 2))
