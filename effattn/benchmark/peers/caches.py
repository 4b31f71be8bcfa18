"""Decoding as plain transformers does it: its cache, then SDPA over what it holds."""

from __future__ import annotations

from torch.nn.functional import scaled_dot_product_attention

from effattn.benchmark.case import Absent, Call


def dynamic(attn, case, inputs) -> Call:
    """transformers' DynamicCache, holding the past, gets a token at each call."""
    from transformers import DynamicCache

    if attn.name != "dense" or case.what != "step":
        raise Absent("it is for steps of dense attention only")
    cache = DynamicCache()
    cache.update(*inputs[3:], 0)

    def call(q, k, v, *past):
        k, v = cache.update(k, v, 0)
        return scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.kv_heads)

    return call
