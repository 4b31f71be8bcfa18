"""What differs between transformers' model types: the tables that `effattn.hf.anatomy` reads.

To support an architecture, add a line to `FAMILIES` (causal LMs) or `ENCODERS`; `tests/test_anatomy.py` holds it to
account.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


def rope_factor(config, attention: nn.Module) -> float:
    """The share of a head's dimensions that RoPE turns, from the config's rope parameters."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = getattr(attention, "layer_type", None)
    if isinstance(rope.get(kind), dict):  # one set of parameters per layer type (Gemma 3)
        rope = rope[kind]
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    return 1.0 if factor is None else float(factor)


def no_rope(config, attention: nn.Module) -> bool:
    """Whether this layer has no rotary embedding at all (each class says it in its own way)."""
    if getattr(attention, "use_rope", True) in (0, False):  # SmolLM3
        return True
    if config.model_type == "cohere2":
        return attention.sliding_window is None
    if config.model_type == "exaone4":
        return attention.sliding_window is not None and not attention.is_sliding
    return False


def sliding_window(attention: nn.Module, config) -> int | None:
    """The window of this layer's own attention (a query sees that many keys, itself included); None: full."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[attention.layer_idx] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


@dataclass(frozen=True)
class Family:
    """What differs between model types; the defaults are Llama's. q, k, v and o are paths from the attention module
    (the one that calls transformers' attention functions), or else from the layer."""

    layers: str = "model.layers"  # from the model, or for encoders from its `base_model`
    attention: str = "self_attn"
    ffn: tuple[str, ...] = ("mlp",)
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None  # one module holds q, k and v: "stacked" rows (Phi-3) or "per_head" (GPT-NeoX)
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    final_norm: str = "model.norm"
    interleaved: bool = False  # rotary pairs are (2i, 2i+1) instead of (i, i + R/2)
    gqa: str = ""  # why `num_key_value_heads` cannot be reduced; empty: it can
    rotary: str = "model.rotary_emb"  # the module that holds the frequencies; empty: no rotary embedding
    encoder: bool = False  # its classes have several heads, or none, and nothing to do with generation


_IGNORED = "transformers ignores num_key_value_heads in this class"

_LLAMA_LIKE = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "olmo",
    "olmo2", "olmo3", "olmoe", "granite", "starcoder2", "smollm3", "exaone4", "seed_oss", "arcee", "nemotron",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LLAMA_LIKE, Family()),
    **dict.fromkeys(("cohere", "cohere2", "glm", "glm4", "ernie4_5", "helium"), Family(interleaved=True)),
    "stablelm": Family(q_norm="q_layernorm", k_norm="k_layernorm"),
    "phi": Family(o="dense", q_norm="q_layernorm", k_norm="k_layernorm", final_norm="model.final_layernorm"),
    "phi3": Family(q="qkv_proj", k="qkv_proj", v="qkv_proj", fused="stacked"),
    "gpt_neox": Family(
        layers="gpt_neox.layers", attention="attention", q="query_key_value", k="query_key_value",
        v="query_key_value", o="dense", fused="per_head", final_norm="gpt_neox.final_layer_norm", gqa=_IGNORED,
        rotary="gpt_neox.rotary_emb",
    ),
    "gpt_oss": Family(gqa="its learned sinks belong to query heads, which a conversion would regroup"),
    "opt": Family(
        layers="model.decoder.layers", ffn=("fc1", "fc2"), o="out_proj",
        final_norm="model.decoder.final_layer_norm", gqa=_IGNORED, rotary="",
    ),
}  # fmt: skip

_BERT = Family(
    layers="encoder.layer", attention="attention.self", ffn=("intermediate", "output"), q="query", k="key", v="value",
    o="attention.output.dense", final_norm="", gqa=_IGNORED, rotary="", encoder=True,
)  # fmt: skip

ENCODERS: dict[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Family(
        layers="transformer.layer", attention="attention", ffn=("ffn",), q="q_lin", k="k_lin", v="v_lin", o="out_lin",
        final_norm="", gqa=_IGNORED, rotary="", encoder=True,
    ),
}  # fmt: skip

# Known causal LMs that are refused with a reason instead of "unknown".
REFUSED = {
    **dict.fromkeys(["gpt2", "gptj", "gpt_neo", "bloom", "mpt", "codegen", "xglm", "biogpt"], _IGNORED),
    "gpt_bigcode": "transformers' class holds either all heads or one (multi_query)",
    "falcon": "transformers' cache keeps all heads whatever num_kv_heads says",
}
