"""Decoding as plain transformers does it: its cache, then SDPA over what it holds."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Absent, Call


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


def quantized(k: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A layer of transformers' QuantizedCache that holds k and v (B, Hkv, T, D) in 4 bits, groups
    of 64, by optimum- quanto: the call unpacks all of both, which each of its steps does before it
    appends the new token to a copy."""
    from transformers.cache_utils import QuantoQuantizedLayer

    layer = QuantoQuantizedLayer(nbits=4, axis_key=0, axis_value=0, q_group_size=64)
    layer.update(k, v)
    return lambda: (
        layer._dequantize(layer._quantized_keys),
        layer._dequantize(layer._quantized_values),
    )
