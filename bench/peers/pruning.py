"""llmcompressor's SparseGPT of one layer."""

from __future__ import annotations

import importlib

from torch import nn

from bench.case import Absent, Call

HOMES = (
    "llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify",
    "llmcompressor.modifiers.obcq.sgpt_sparsify",
)


def sparsegpt(attn, case, inputs) -> Call:
    """`case.sparsity` of inputs (weight, Hessian): what its modifier calls for every layer, without
    its hooks.
    """
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
        # sparsity, N, M, block size, dampening (whose name has changed), whether zeros stay
        _, pruned = sparsify(
            layer,
            {layer: hessian.clone()},
            share,
            int(n) if m else 0,
            int(m or 0),
            128,
            0.01,
            False,
        )
        return pruned

    return call
