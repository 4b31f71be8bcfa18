"""GPT-2 as GPTBigCode: the same layer, whose weights GPT-2 keeps transposed (Conv1D) and whose q,
k and v lie one after the other instead of head by head. From there `mqa` is what a conversion of
its heads can do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effattn.rehosting.base import Host, Weights, linear, norm, register
from effattn.rehosting.hosts.opt import by_head


@register("gpt2")
class Gpt2(Host):
    """To GPTBigCode."""

    layers = "transformer.h"
    to, to_layers = "gpt_bigcode", "transformer.h"

    @classmethod
    def refuses(cls, config: Any) -> str:
        return (
            "add_cross_attention=True: it is half of a pair" if config.add_cross_attention else ""
        )

    @classmethod
    def config(cls, config: Any) -> dict:
        same = (
            "n_embd",
            "n_inner",
            "n_layer",
            "n_head",
            "n_positions",
            "activation_function",
            "layer_norm_epsilon",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "scale_attn_weights",
        )
        return {name: getattr(config, name) for name in same} | {"multi_query": False}

    @classmethod
    def outside(cls, model: Any) -> Weights:
        return {
            "transformer.wte.weight": model.transformer.wte.weight,
            "transformer.wpe.weight": model.transformer.wpe.weight,
            **norm("transformer.ln_f", model.transformer.ln_f),
            "lm_head.weight": model.lm_head.weight,
        }

    @classmethod
    def layer(cls, block: nn.Module, config: Any) -> Weights:
        fused, heads = block.attn.c_attn, config.n_head
        q, k, v = fused.weight.T.chunk(3)
        q_bias, k_bias, v_bias = fused.bias.chunk(3)
        if config.scale_attn_by_inverse_layer_idx:
            q, q_bias = q / (block.attn.layer_idx + 1), q_bias / (block.attn.layer_idx + 1)
        biases = by_head([q_bias, k_bias, v_bias], heads)
        return {
            **norm("ln_1", block.ln_1),
            **linear("attn.c_attn", by_head([q, k, v], heads), biases),
            **_transposed("attn.c_proj", block.attn.c_proj),
            **norm("ln_2", block.ln_2),
            **_transposed("mlp.c_fc", block.mlp.c_fc),
            **_transposed("mlp.c_proj", block.mlp.c_proj),
        }


def _transposed(name: str, module: Any) -> dict[str, Tensor]:
    return linear(name, module.weight.T, module.bias)
