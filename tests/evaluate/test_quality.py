"""On the real (embedded) model, conversion is as good as the documentation says, on less data so
that it stays quick.
"""

from __future__ import annotations

import copy

import effattn
from effattn.evaluate.loss import token_losses


def test_optimal_keeps_what_mean_loses_and_fewer_heads_cost_more():
    parent, _ = effattn.embedded.load()
    calibration, held_out = (
        effattn.embedded.tokens("train", 8192),
        effattn.embedded.tokens("validation", 4097),
    )
    before = token_losses(parent, held_out, 512).mean().item()

    def excess(kv_heads: int, **options) -> float:
        model = copy.deepcopy(parent)
        effattn.convert_gqa(model, kv_heads, calibration, **options)
        return token_losses(model, held_out, 512).mean().item() - before

    four, two, one = (excess(kv_heads) for kv_heads in (4, 2, 1))
    assert 0 < four < two < one
    assert two < 0.15 * excess(2, method="mean", refit=False)
