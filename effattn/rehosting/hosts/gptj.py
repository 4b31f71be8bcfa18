"""GPT-J as Phi: the same layer, but that GPT-J turns neighbouring dimensions (2i, 2i + 1) and Phi
(i, i + R/2). The rows of q and k change places accordingly, in both alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effattn.rehosting.base import Host, Weights, copied, linear, norm, register


@register("gptj")
class GptJ(Host):
    """To Phi."""

    layers = "transformer.h"
    to, to_layers = "phi", "model.layers"

    @classmethod
    def refuses(cls, config: Any) -> str:
        size = config.n_embd // config.n_head
        if not config.rotary_dim or config.rotary_dim % 2 or config.rotary_dim > size:
            return (
                f"rotary_dim={config.rotary_dim!r} with heads of {size}, valid is even, 2 to that"
            )
        return ""

    @classmethod
    def config(cls, config: Any) -> dict:
        size = config.n_embd // config.n_head
        share = config.rotary_dim / size
        if int(size * share) != config.rotary_dim:  # Phi rounds the product down
            share = (config.rotary_dim + 0.5) / size
        return {
            "hidden_size": config.n_embd,
            "intermediate_size": config.n_inner or 4 * config.n_embd,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.n_head,
            "max_position_embeddings": config.n_positions,
            "hidden_act": config.activation_function,
            "layer_norm_eps": config.layer_norm_epsilon,
            "resid_pdrop": config.resid_pdrop,
            "embd_pdrop": config.embd_pdrop,
            "attention_dropout": config.attn_pdrop,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": share,
            },
        }

    @classmethod
    def outside(cls, model: Any) -> Weights:
        return {
            "model.embed_tokens.weight": model.transformer.wte.weight,
            **norm("model.final_layernorm", model.transformer.ln_f),
            **copied("lm_head", model.lm_head),
        }

    @classmethod
    def layer(cls, block: nn.Module, config: Any) -> Weights:
        turned, size = config.rotary_dim, config.n_embd // config.n_head
        # the real parts of all pairs, then their imaginary parts, then what is not turned
        order = torch.cat(
            [torch.arange(0, turned, 2), torch.arange(1, turned, 2), torch.arange(turned, size)]
        )
        found = {
            **norm("input_layernorm", block.ln_1),
            **copied("self_attn.v_proj", block.attn.v_proj),
            **copied("self_attn.dense", block.attn.out_proj),
            **copied("mlp.fc1", block.mlp.fc_in),
            **copied("mlp.fc2", block.mlp.fc_out),
        }
        for name in ("q_proj", "k_proj"):
            by_head = getattr(block.attn, name).weight.unflatten(0, (config.n_head, size))
            found |= linear(f"self_attn.{name}", by_head[:, order].flatten(0, 1))
        return found
