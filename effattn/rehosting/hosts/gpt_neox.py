"""GPT-NeoX (Pythia) as Phi: both have a parallel residual, Phi one norm where NeoX has two.

The gains and biases of both norms go into what follows them, q, k and v, and the FFN's first
module; what is left of each is the same norm without gains. NeoX's q, k and v lie in one module,
head by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effattn.rehosting.base import Host, Weights, copied, folded, linear, norm, register


@register("gpt_neox")
class GptNeoX(Host):
    """To Phi."""

    layers = "gpt_neox.layers"
    to, to_layers = "phi", "model.layers"

    @classmethod
    def refuses(cls, config: Any) -> str:
        if not config.use_parallel_residual:
            return (
                "use_parallel_residual=False: its FFN reads what attention has added, Phi's does "
                "not"
            )
        return ""

    @classmethod
    def config(cls, config: Any) -> dict:
        return {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "hidden_act": config.hidden_act,
            "layer_norm_eps": config.layer_norm_eps,
            "resid_pdrop": config.hidden_dropout,
            "embd_pdrop": config.hidden_dropout,
            "attention_dropout": config.attention_dropout,
            "rope_parameters": dict(config.rope_parameters),
        }

    @classmethod
    def outside(cls, model: Any) -> Weights:
        return {
            "model.embed_tokens.weight": model.gpt_neox.embed_in.weight,
            **norm("model.final_layernorm", model.gpt_neox.final_layer_norm),
            **copied("lm_head", model.get_output_embeddings()),
        }

    @classmethod
    def layer(cls, block: nn.Module, config: Any) -> Weights:
        fused, heads = block.attention.query_key_value, config.num_attention_heads
        weight, bias = folded(fused.weight, fused.bias, block.input_layernorm)
        first = block.mlp.dense_h_to_4h
        found = {
            **copied("self_attn.dense", block.attention.dense),
            **linear("mlp.fc1", *folded(first.weight, first.bias, block.post_attention_layernorm)),
            **copied("mlp.fc2", block.mlp.dense_4h_to_h),
            "input_layernorm.weight": torch.ones_like(bias[: weight.shape[1]]),
            "input_layernorm.bias": torch.zeros_like(bias[: weight.shape[1]]),
        }
        # (H, q k v, d, ...)
        rows, biases = (each.unflatten(0, (heads, 3, -1)) for each in (weight, bias))
        for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part = rows[:, place].flatten(0, 1), biases[:, place].flatten()
            found |= linear(f"self_attn.{name}", *part)
        return found
