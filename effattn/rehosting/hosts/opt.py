"""OPT as GPTBigCode: norms before attention and FFN, learned positions, biases everywhere.

OPT's table of positions has two rows that no token reads. GPTBigCode holds all heads, or one for
keys and values (`multi_query`), so that from there `mqa` is what a conversion can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effattn.rehosting.base import Host, Weights, copied, linear, norm, register

OFFSET = 2  # rows of OPT's table before that of the first token


@register("opt")
class Opt(Host):
    """To GPTBigCode."""

    layers = "model.decoder.layers"
    to, to_layers = "gpt_bigcode", "transformer.h"

    @classmethod
    def refuses(cls, config: Any) -> str:
        if not config.do_layer_norm_before:
            return "do_layer_norm_before=False: its norms come after, GPTBigCode's before"
        if config._remove_final_layer_norm:
            return "it has no final norm, GPTBigCode has one"
        if config.word_embed_proj_dim != config.hidden_size:
            return (
                f"word_embed_proj_dim={config.word_embed_proj_dim} is not its hidden size "
                f"{config.hidden_size}"
            )
        return ""

    @classmethod
    def config(cls, config: Any) -> dict:
        return {
            "n_embd": config.hidden_size,
            "n_inner": config.ffn_dim,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
            "n_positions": config.max_position_embeddings,
            "activation_function": config.activation_function,
            "layer_norm_epsilon": nn.LayerNorm(1).eps,  # which OPT does not set
            "resid_pdrop": config.dropout,
            "embd_pdrop": 0.0,
            "attn_pdrop": config.attention_dropout,
            "multi_query": False,
        }

    @classmethod
    def outside(cls, model: Any) -> Weights:
        decoder = model.model.decoder
        return {
            "transformer.wte.weight": decoder.embed_tokens.weight,
            "transformer.wpe.weight": decoder.embed_positions.weight[OFFSET:],
            **norm("transformer.ln_f", decoder.final_layer_norm),
            "lm_head.weight": model.lm_head.weight,
        }

    @classmethod
    def layer(cls, block: nn.Module, config: Any) -> Weights:
        attention, heads = block.self_attn, config.num_attention_heads
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [part.weight for part in parts]
        biases = [copied("", part)[".bias"] for part in parts]
        return {
            **norm("ln_1", block.self_attn_layer_norm),
            **linear("attn.c_attn", by_head(weights, heads), by_head(biases, heads)),
            **copied("attn.c_proj", attention.out_proj),
            **norm("ln_2", block.final_layer_norm),
            **copied("mlp.c_fc", block.fc1),
            **copied("mlp.c_proj", block.fc2),
        }


def by_head(parts: list[Tensor], heads: int) -> Tensor:
    """Rows of q, k and v, (H·d, ...) each, head by head: (H·3·d, ...)."""
    split = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.stack(split, dim=1).flatten(0, 2)
