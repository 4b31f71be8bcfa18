"""llmcompressor's SparseGPT of one layer."""

from __future__ import annotations

import importlib

from torch import nn

from effattn.benchmark.case import Absent, Call

HOMES = ("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify", "llmcompressor.modifiers.obcq.sgpt_sparsify")


def sparsegpt(attn, case, inputs) -> Call:
    """`case.sparsity` of inputs (weight, Hessian): what its modifier calls for every layer, without its hooks."""
    for home in HOMES:
        try:
            sparsify = importlib.import_module(home).sparsify_weight
            break
        except (ImportError, AttributeError):
            continue
    else:
        raise Absent(f"this version has no sparsify_weight in {' or '.join(HOMES)}")
    n, _, m = case.sparsity.partition(":")
    share = int(n) / int(m) if m else float(n)

    def call(weight, hessian):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        _, pruned = sparsify(
            module=layer, hessians_dict={layer: hessian.clone()}, sparsity=share, prune_n=int(n) if m else 0,
            prune_m=int(m or 0), block_size=128, dampening_fraction=0.01, preserve_sparsity_mask=False,
        )  # fmt: skip
        return pruned

    return call
