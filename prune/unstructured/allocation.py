"""Shares by sensitivity: layers with more outlying weights keep more of them (OWL,
arXiv:2310.05175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from effattn.calibration.hessian import Hessian
from effattn.hf import anatomy as hf
from effattn.prune.unstructured import layers
from effattn.prune.unstructured.nm import Sparsity
from effattn.prune.unstructured.plan import Plan

# how far a layer's share may be from the mean when shares follow sensitivity (lambda in OWL)
SPREAD = 0.08
OUTLIER = 5.0  # times the mean score that makes a weight an outlier (M in OWL)


@torch.no_grad()
def outliers(runner: layers.Runner, layer: hf.Layer, modules: str, source, sink) -> float:
    """The share of a layer's weights whose Wanda score is over `OUTLIER` times their matrix's mean;
    outputs of the unchanged layer go to `sink`."""
    found, over, total = layers.linears(layer, modules), 0, 0
    with layers.working(layer.block, runner.dtype):
        groups, _ = layers.input_groups(found, lambda: runner.call(layer.index, source[0]))
        # One pass sees all inputs: their norms take little room, whole Hessians would not.
        seen = {group[0]: Hessian(diagonal_only=True) for group in groups}
        handles = [
            found[path].register_forward_pre_hook(
                lambda _, args, path=path: seen[path].add(args[0])
            )
            for path in seen
        ]
        try:
            for number, states in enumerate(source):
                sink[number] = runner.call(layer.index, states).cpu()
        finally:
            for handle in handles:
                handle.remove()
        for group in groups:
            seen[group[0]].check(f"layer {layer.index}'s {group[0]}")
            for path in group:
                scores = found[path].weight.abs() * seen[group[0]].diagonal.sqrt()
                over += int((scores > OUTLIER * scores.mean()).sum())
                total += scores.numel()
    return over / total


def allocate(plan: Plan, measured: Sequence[float]) -> Plan:
    """Shares that fall with a layer's `outliers`, within `SPREAD` of the mean, which stays (layers
    count alike). ValueError where a share would leave 0 to 1."""
    # OWL's equation for a layer's share: outlier ratios mapped to 0 to 2 lambda, less their mean
    low, high = min(measured), max(measured)
    scaled = [2 * SPREAD * (one - low) / (high - low) if high > low else 0.0 for one in measured]
    mean = sum(scaled) / len(scaled)
    wanted = [one.share - (more - mean) for one, more in zip(plan.sparsities, scaled, strict=True)]
    if min(wanted) < 0 or max(wanted) > 1:
        raise ValueError(
            f"sparsity: got {plan.sparsities[0]} with 'sensitivity', which varies it by up to "
            f"{SPREAD}; valid is {SPREAD} to {1 - SPREAD:g}"
        )
    return replace(plan, sparsities=tuple(Sparsity(share) for share in wanted))
