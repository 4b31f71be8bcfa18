"""Windowed attention: local-attention, and transformers' Longformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.case import Absent, Call

# tokens beyond which local-attention's bf16 products, emulated on a CPU, take seconds a call
EMULATED = 1024


def local_attention(attn, case, inputs) -> Call:
    """lucidrains' LocalAttention with `exact_windowsize`; without it, queries see one to two
    windows.
    """
    from local_attention import LocalAttention

    if (
        attn.name != "sliding"
        or attn.sinks
        or attn.dilation > 1
        or not case.causal
        or case.heads != case.kv_heads
    ):
        raise Absent("it has plain causal windows with as many key as query heads only")
    if inputs[0].device.type == "cpu" and case.dtype != "float32" and case.tokens > EMULATED:
        raise Absent(f"seconds a call beyond {EMULATED} tokens in {case.dtype} on a CPU")
    # its window counts the keys before the query's own
    run = LocalAttention(
        attn.window - 1,
        causal=True,
        look_backward=1,
        look_forward=0,
        autopad=True,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    return lambda q, k, v: run(q, k, v)


class Given(nn.Module):
    """In the place of a projection: gives what it was handed, whatever it is asked."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value


def longformer(attn, case, inputs) -> Call:
    """LongformerSelfAttention with its projections replaced by q, k and v themselves. Its window of
    w sees w + 1.
    """
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    first = getattr(attn, "first", 0)
    if attn.name not in ("longformer", "sliding") or case.causal or case.heads != case.kv_heads:
        raise Absent("it is bidirectional, with as many key as query heads")
    if attn.name == "longformer" and not first:
        raise Absent("raced with the first tokens global only")
    side = attn.window - 1
    config = LongformerConfig(
        hidden_size=case.heads * case.dim,
        num_attention_heads=case.heads,
        attention_window=[side],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0).to(inputs[0].device, inputs[0].dtype).eval()
    for name in ("query", "key", "value"):
        setattr(layer, name, Given())
        setattr(layer, f"{name}_global", Given())
    batch, _, tokens, _ = inputs[0].shape
    if tokens % side:
        raise Absent(f"lengths are multiples of its window, {side}")
    mask = torch.zeros(batch, tokens, device=inputs[0].device)
    mask[:, :first] = 10000.0

    def call(q, k, v):
        q, k, v = (x.permute(2, 0, 1, 3).flatten(2) for x in (q, k, v))  # (T, B, H D)
        # q is scaled in place
        layer.query.value, layer.key.value, layer.value.value = (q.clone(), k, v)
        layer.query_global.value, layer.key_global.value, layer.value_global.value = (
            q[:first].clone(),
            k,
            v,
        )
        out = layer(
            q.transpose(0, 1),
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=first > 0,
        )[0]
        return out.unflatten(-1, (case.heads, case.dim)).transpose(1, 2)

    return call
