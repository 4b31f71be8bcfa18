"""What differs between transformers' model types: the tables that `effattn.hf.anatomy` reads.

To support an architecture, add a line to `FAMILIES` (causal LMs) or `ENCODERS`;
`tests/hf/test_anatomy.py` holds it to account."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effattn.errors import Unsupported


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
    """The window of this layer's own attention (a query sees that many keys, itself included);
    None: full.

    Raises Unsupported for a kind of attention that is neither."""
    windows = FAMILIES[config.model_type].windows if config.model_type in FAMILIES else ""
    if windows == "layer_types":
        kind = config.layer_types[attention.layer_idx]
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported(
                f"layer {attention.layer_idx}: its own attention is {kind!r}, valid are full and "
                "sliding"
            )
        windows = "all" if kind == "sliding_attention" else ""
    return config.sliding_window if windows == "all" else None


def trained_length(config) -> int | None:
    """The longest sequence that a model of this config was made for, in tokens; None where it does
    not say."""
    return getattr(config, "max_position_embeddings", None)


@dataclass(frozen=True)
class Family:
    """What differs between model types; the defaults are Llama's. q, k, v and o are paths from the
    attention module (the one that calls transformers' attention functions), or else from the
    layer."""

    layers: str = "model.layers"  # from the model, or for encoders from its `base_model`
    attention: str = "self_attn"
    ffn: tuple[str, ...] = ("mlp",)
    # paths from the layer; empty: a mixture of experts
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    ffn_size: str = "intermediate_size"  # the config's name of the FFN's inner size
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    # one module holds q, k and v: "stacked" rows (Phi-3), "per_head" (GPT-NeoX), or "multi_query",
    # stacked where all query heads share one key/value head and per head otherwise (GPTBigCode)
    fused: str | None = None
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    final_norm: str = "model.norm"
    interleaved: bool = False  # rotary pairs are (2i, 2i+1) instead of (i, i + R/2)
    gqa: str = ""  # why `num_key_value_heads` cannot be reduced; empty: it can
    # the module that holds the frequencies; empty: no rotary embedding
    rotary: str = "model.rotary_emb"
    positions: str = ""  # the table of learned positions, from the model
    # the config's names of the width of the residual stream
    hidden_size: tuple[str, ...] = ("hidden_size",)
    # the class reads head_dim from its config, so that heads can be any number
    explicit_head_dim: bool = True
    # embeddings are multiplied by sqrt(hidden_size), and norms by 1 + their weight
    scaled_embeddings: bool = False
    # which layers obey config.sliding_window: none, "all", or those that "layer_types" names
    windows: str = ""
    # its classes have several heads, or none, and nothing to do with generation
    encoder: bool = False


# Fields of a config that give o_proj and the FFN's output module biases (and the other projections
# beside them).
BIASES = {"heads": "attention_bias", "ffn": "mlp_bias"}

# Lists in a config with an entry for each layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def of_layers(config, kept: list[int]) -> dict[str, object]:
    """What a config says of single layers, as it is when the layers `kept` are all there is: field
    -> value.
    """
    lists = {name: getattr(config, name, None) for name in PER_LAYER}
    changes = {
        name: [values[index] for index in kept]
        for name, values in lists.items()
        if values is not None
    }
    # Qwen's experts: indices, and every n-th layer of the rest
    if getattr(config, "mlp_only_layers", None) is not None:
        every = getattr(config, "decoder_sparse_step", 1)
        dense = [
            place
            for place, index in enumerate(kept)
            if index in config.mlp_only_layers or (index + 1) % every
        ]
        changes |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return changes


_IGNORED = "transformers ignores num_key_value_heads in this class"
_REHOST = f"{_IGNORED}; effattn.rehost(model) is the same model as"

_LLAMA_LIKE = ("llama", "olmo", "olmo2", "granite", "seed_oss")
_LAYERWISE = ("qwen2", "qwen3", "ministral", "olmo3", "smollm3", "exaone4")
_GATE_UP = ("mlp.gate_up_proj",)  # one module, the gate's rows first

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LLAMA_LIKE, Family()),
    **dict.fromkeys(_LAYERWISE, Family(windows="layer_types")),
    "mistral": Family(windows="all"),
    **dict.fromkeys(("mixtral", "qwen3_moe"), Family(ffn_in=(), windows="all")),
    "qwen2_moe": Family(ffn_in=(), windows="layer_types"),
    "olmoe": Family(ffn_in=(), explicit_head_dim=False),
    "gemma": Family(scaled_embeddings=True),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), Family(scaled_embeddings=True, windows="layer_types")
    ),
    **dict.fromkeys(("arcee", "nemotron"), Family(ffn_in=("mlp.up_proj",))),
    "starcoder2": Family(ffn_in=("mlp.c_fc",), ffn_out="mlp.c_proj", windows="all"),
    **dict.fromkeys(("cohere", "ernie4_5"), Family(interleaved=True)),
    "cohere2": Family(interleaved=True, windows="layer_types"),
    "helium": Family(interleaved=True, explicit_head_dim=False),
    **dict.fromkeys(("glm", "glm4"), Family(interleaved=True, ffn_in=_GATE_UP)),
    "stablelm": Family(q_norm="q_layernorm", k_norm="k_layernorm", explicit_head_dim=False),
    "phi": Family(
        o="dense",
        q_norm="q_layernorm",
        k_norm="k_layernorm",
        final_norm="model.final_layernorm",
        ffn_in=("mlp.fc1",),
        ffn_out="mlp.fc2",
    ),
    "phi3": Family(
        q="qkv_proj", k="qkv_proj", v="qkv_proj", fused="stacked", ffn_in=_GATE_UP, windows="all"
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        attention="attention",
        q="query_key_value",
        k="query_key_value",
        v="query_key_value",
        o="dense",
        fused="per_head",
        final_norm="gpt_neox.final_layer_norm",
        gqa=f"{_REHOST} Phi, which can",
        rotary="gpt_neox.rotary_emb",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        explicit_head_dim=False,
    ),
    "gpt_oss": Family(
        ffn_in=(),
        gqa="its learned sinks belong to query heads, which a conversion would regroup",
        windows="layer_types",
    ),
    "opt": Family(
        layers="model.decoder.layers",
        ffn=("fc1", "fc2"),
        o="out_proj",
        final_norm="model.decoder.final_layer_norm",
        gqa=f"{_REHOST} GPTBigCode, which can have one",
        rotary="",
        ffn_in=("fc1",),
        ffn_out="fc2",
        ffn_size="ffn_dim",
        positions="model.decoder.embed_positions",
        hidden_size=("hidden_size", "word_embed_proj_dim"),
        explicit_head_dim=False,
    ),
    "gpt2": Family(
        layers="transformer.h",
        attention="attn",
        q="c_attn",
        k="c_attn",
        v="c_attn",
        o="c_proj",
        fused="stacked",
        final_norm="transformer.ln_f",
        gqa=f"{_REHOST} GPTBigCode, which can have one",
        rotary="",
        positions="transformer.wpe",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        ffn_size="n_inner",
        explicit_head_dim=False,
    ),
    "gpt_bigcode": Family(
        layers="transformer.h",
        attention="attn",
        q="c_attn",
        k="c_attn",
        v="c_attn",
        o="c_proj",
        fused="multi_query",
        final_norm="transformer.ln_f",
        rotary="",
        positions="transformer.wpe",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        ffn_size="n_inner",
        explicit_head_dim=False,
    ),
}

_BERT = Family(
    layers="encoder.layer",
    attention="attention.self",
    ffn=("intermediate", "output"),
    q="query",
    k="key",
    v="value",
    o="attention.output.dense",
    final_norm="",
    gqa=_IGNORED,
    rotary="",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    explicit_head_dim=False,
    encoder=True,
)

ENCODERS: dict[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Family(
        layers="transformer.layer",
        attention="attention",
        ffn=("ffn",),
        q="q_lin",
        k="k_lin",
        v="v_lin",
        o="out_lin",
        final_norm="",
        gqa=_IGNORED,
        rotary="",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        ffn_size="hidden_dim",
        hidden_size=("dim",),
        explicit_head_dim=False,
        encoder=True,
    ),
}

# Known causal LMs that are refused with a reason instead of "unknown".
_BY_ITSELF = (
    "its class computes attention by itself, not through transformers' ALL_ATTENTION_FUNCTIONS"
)
REFUSED = {
    "gptj": f"{_BY_ITSELF}; effattn.rehost(model) is the same model as Phi, whose class does",
    **dict.fromkeys(("gpt_neo", "bloom", "mpt", "codegen", "xglm"), _BY_ITSELF),
    "biogpt": f"effattn has no description of its layers (and {_IGNORED})",
    "falcon": f"{_BY_ITSELF}, and its cache keeps all heads whatever num_kv_heads says",
}
