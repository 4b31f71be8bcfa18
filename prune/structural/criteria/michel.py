"""Gradients of gates: E|dL/d gate| at gate 1, over windows (Michel et al., arXiv:1905.10650,
equation 2).

Scores are divided by their L2 norm over the layer, as there (section 4.1), so that layers can be
compared."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.hf.anatomy import Anatomy
from effattn.prune.structural.criteria.base import (
    Importance,
    Sums,
    by_group,
    criterion,
    gradients,
    losses,
    watching_blocks,
)
from effattn.prune.structural.gates import gated


@criterion("michel", ("heads", "ffn"), needs_loss=True, place=30)
def score(parts: Anatomy, batches: list[Tensor], targets: list[str], seed: int) -> Importance:
    """A gate of its own for each window; a K/V head's score is the sum over its query heads."""
    sums = Sums(parts)
    device = parts.embeddings.weight.device
    for batch in batches:
        gates: dict[str, list[Tensor]] = {target: [] for target in targets}
        for layer in parts:
            for target in targets:
                size = layer.heads if target == "heads" else layer.feed_forward.size
                gates[target].append(
                    torch.ones(len(batch), size, device=device, requires_grad=True)
                )
        # the sum over windows has each window's own gradient at its own gates
        with gradients(parts), watching_blocks(parts), gated(parts, **gates):
            losses(parts.model, batch).sum().backward()
        for target, of_layers in gates.items():
            for index, gate in enumerate(of_layers):
                assert gate.grad is not None  # every gate is a factor of the loss
                sums.add(target, index, gate.grad.abs().sum(0))
    found = sums.importance(by_group)
    for target in targets:
        scores = getattr(found, target)
        setattr(found, target, scores / scores.norm(dim=1, keepdim=True).clamp_min(1e-300))
    return found
