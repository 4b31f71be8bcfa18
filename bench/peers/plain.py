"""Plain torch: scaled_dot_product_attention with each of its backends, compiled flex_attention, and
nn.Linear.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Absent, Call, Defined


def sdpa(attn, case, inputs, backend: SDPBackend | None = None) -> Call:
    """Dense attention, by the backend that torch chooses or by one of them."""
    if attn.name != "dense":
        raise Absent("it has dense attention only")
    options = {
        "is_causal": case.causal and case.what != "decode",
        "enable_gqa": case.heads != case.kv_heads,
    }

    def call(q, k, v):
        if backend is None:
            return scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options)

    return call


def sdpa_flash(attn, case, inputs) -> Call:
    """`sdpa` with FlashAttention, or nothing."""
    return sdpa(attn, case, inputs, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(attn, case, inputs) -> Call:
    """`sdpa` with cuDNN's kernel, or nothing."""
    return sdpa(attn, case, inputs, SDPBackend.CUDNN_ATTENTION)


def sdpa_efficient(attn, case, inputs) -> Call:
    """`sdpa` with the memory-efficient kernel, or nothing."""
    return sdpa(attn, case, inputs, SDPBackend.EFFICIENT_ATTENTION)


def sdpa_math(attn, case, inputs) -> Call:
    """`sdpa` in plain operations, with all scores in memory."""
    return sdpa(attn, case, inputs, SDPBackend.MATH)


def flex(attn, case, inputs) -> Call:
    """Any exact pattern, by its definition: `sees` becomes the mask that is compiled into the
    kernel.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not attn.traits.exact:
        raise Absent("it has exact patterns only")
    queries, keys = inputs[0].shape[2], inputs[1].shape[2]

    def visible(b, h, i, j):
        return attn.sees(i + (keys - queries), j, h, case.heads, case.causal)

    torch._dynamo.reset()  # it gives up after a few shapes otherwise
    mask = create_block_mask(visible, None, None, queries, keys, device=inputs[0].device)
    run = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def dense_layer(linear, case, inputs) -> Call:
    """The nn.Linear that a Monarch layer takes the place of."""
    weight = linear.weight
    return Defined(linear, lambda x: x @ weight.detach().to(x).mT)
