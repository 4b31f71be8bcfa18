"""A model in one GGUF file, as llama.cpp reads it.

    write(model, tokenizer, "model.gguf", "q8_0")

Models whose layers are alike have their own architecture there; those whose layers differ are
"deci", which has a number of heads and an FFN width for each layer, 0 heads where attention is left
out. A layer that has no FFN gets one of zeros: llama.cpp leaves out its attention too, or cannot
run the file. Tensors are converted and written one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effattn.errors import Unsupported, check_choice
from effattn.exporting.gguf_tokenizer import Vocabulary
from effattn.hf import anatomy, uneven
from effattn.hf.gguf_files import INSTALL
from effattn.hf.gguf_files import SUFFIX as SUFFIX

FORMATS = ("f16", "q8_0", "bf16", "f32")
# what llama.cpp calls a family
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
UNEVEN = "deci"
# whose rotated pairs are (2i, 2i + 1) there: rows of q and k go into that order
INTERLEAVED = ("llama", UNEVEN)
SCALINGS = {"linear": "linear", "yarn": "yarn"}  # transformers' rules that it has as numbers
FLOAT16 = 65504.0
ZEROS = 32  # width of an FFN of zeros: a block of q8_0
FILE_TYPES = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}


def require_gguf():
    """The package `gguf`. ValueError, saying what to install, without it."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"to: 'gguf' needs the package gguf: {INSTALL}") from None
    return gguf


def architecture(parts: anatomy.Anatomy) -> str:
    """llama.cpp's name for such a model. Unsupported, saying what it has, for what it has not."""
    kind = type(parts.model).__name__
    if parts.family not in ARCHITECTURES or not kind.endswith("ForCausalLM"):
        raise Unsupported(
            f"gguf: {kind} ({parts.family}) is no model that effattn can export so; valid are "
            f"causal models of {', '.join(ARCHITECTURES)}"
        )
    if any(layer.own_window is not None for layer in parts.layers):
        raise Unsupported(
            f"gguf: {kind} has layers with a window, which {parts.family} has not there"
        )
    if not uneven.overrides(parts.config):
        return ARCHITECTURES[parts.family]
    if parts.family != "llama":
        raise Unsupported(
            f"gguf: layers that differ are architecture {UNEVEN!r} there, which is a Llama; this "
            f"is a {kind}"
        )
    return UNEVEN


def check(parts: anatomy.Anatomy, kind: str) -> None:
    """ValueError and Unsupported for what cannot be exported, before anything is written."""
    check_choice("format", kind, FORMATS)
    require_gguf()
    architecture(parts)
    _scaling(parts)
    if getattr(parts.config, "hidden_act", "silu") != "silu":
        raise Unsupported(
            f"gguf: the FFN's activation is {parts.config.hidden_act!r}, valid there is 'silu'"
        )


def write(model: nn.Module, vocabulary: Vocabulary, file: Path, kind: str) -> None:
    """Writes the file. kind: one of FORMATS, of the matrices; norms and biases are float32, and
    matrices whose rows q8_0's blocks of 32 do not divide are float16."""
    gguf = require_gguf()
    parts = anatomy.of(model)
    arch = architecture(parts)
    writer = gguf.GGUFWriter(str(file), arch)
    tensors = dict(_tensors(gguf, parts, arch))
    kinds = {name: _kind(gguf, one.tensor, kind) for name, one in tensors.items()}
    try:
        _describe(gguf, writer, parts, kind)
        _add_vocabulary(writer, vocabulary)
        for name, one in tensors.items():
            shape = gguf.quants.quant_shape_to_byte_shape(one.tensor.shape, kinds[name])
            size = math.prod(shape)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, one in tensors.items():
            writer.write_tensor_data(_numbers(gguf, name, one, kinds[name]))
    finally:
        writer.close()


@dataclass(frozen=True)
class _Tensor:
    """One tensor, and the heads whose rows go into llama.cpp's order (None: it stays)."""

    tensor: Tensor
    heads: int | None = None


def _tensors(gguf, parts: anatomy.Anatomy, arch: str) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of the file, in order, by its name there."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, len(parts.layers))
    turned = {}
    for layer in parts.layers if arch in INTERLEAVED else ():
        turned |= {layer.q.module: layer.heads, layer.k.module: layer.kv_heads}
    owners = dict(parts.model.named_modules())
    tied = parts.head is None
    for name, tensor in parts.model.state_dict().items():
        if tied and name.startswith("lm_head."):
            continue
        owner = owners[name.rpartition(".")[0]]
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise Unsupported(f"gguf: {name}: architecture {arch!r} has no such weight there")
        yield named, _Tensor(tensor, turned.get(owner))
    embedded = parts.embeddings.weight
    size = embedded.shape[1]
    for index in without_ffn(parts):
        yield f"blk.{index}.ffn_norm.weight", _Tensor(embedded.new_ones(size))
        for name, shape in {
            "gate": (ZEROS, size),
            "up": (ZEROS, size),
            "down": (size, ZEROS),
        }.items():
            yield f"blk.{index}.ffn_{name}.weight", _Tensor(embedded.new_zeros(shape))
    if _rope(parts).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _Tensor(_factors(parts))


def without_ffn(parts: anatomy.Anatomy) -> list[int]:
    """Layers that have none."""
    return [layer.index for layer in parts.layers if not layer.feed_forward.size]


def _factors(parts: anatomy.Anatomy) -> Tensor:
    """(R/2,) by how much each frequency is divided."""
    layer = next(layer for layer in parts.layers if layer.attends)
    scaled = layer.rotary.rope().inv_freq.double().cpu()
    powers = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (_rope(parts)["rope_theta"] ** -powers / scaled).float()


def _kind(gguf, tensor: Tensor, kind: str):
    """The type of one tensor in the file."""
    types = gguf.GGMLQuantizationType
    if tensor.dim() < 2:
        return types.F32
    if kind == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
        return types.F16
    return types[kind.upper()]


def _numbers(gguf, name: str, one: _Tensor, kind) -> np.ndarray:
    """What is written of a tensor, as bytes. ValueError, naming it, for numbers beyond float16."""
    tensor = one.tensor.detach().cpu().float()
    if one.heads:
        # (heads, 2, pairs) -> (heads, pairs, 2): both parts of a pair side by side
        rows = tensor.unflatten(0, (one.heads, 2, -1))
        tensor = rows.transpose(1, 2).flatten(0, 2).contiguous()
    if kind == gguf.GGMLQuantizationType.F16 and bool((tensor.abs() > FLOAT16).any()):
        raise ValueError(
            f"format: got 'f16', {name} has numbers beyond {FLOAT16:,.0f}; valid is 'bf16'"
        )
    data = gguf.quants.quantize(tensor.numpy(), kind)
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1)


def _describe(gguf, writer, parts: anatomy.Anatomy, kind: str) -> None:
    """The sizes and settings of a model."""
    config, layers = parts.config, parts.layers
    counts: dict[str, Any] = {
        "head_count": [layer.heads for layer in layers],
        "head_count_kv": [layer.kv_heads for layer in layers],
        "feed_forward_length": [layer.feed_forward.size or ZEROS for layer in layers],
    }
    for name, values in counts.items():
        alike = len(set(values)) == 1 and not uneven.overrides(config)
        getattr(writer, f"add_{name}")(values[0] if alike else values)
    name = getattr(config, "_name_or_path", "")
    writer.add_name(Path(name).name or type(parts.model).__name__)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(parts.embeddings.weight.shape[0])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(parts.head_dim)
    writer.add_value_length(parts.head_dim)
    writer.add_rope_dimension_count(layers[0].rotary_dims)
    writer.add_rope_freq_base(_rope(parts)["rope_theta"])
    if scaling := _scaling(parts):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if trained := scaling.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(trained)
        for end in ("fast", "slow"):
            if (value := scaling.get(f"beta_{end}")) is not None:
                getattr(writer, f"add_rope_scaling_yarn_beta_{end}")(float(value))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rope(parts: anatomy.Anatomy) -> dict[str, Any]:
    return dict(getattr(parts.config, "rope_parameters", None) or {})


def _scaling(parts: anatomy.Anatomy) -> dict[str, Any]:
    """The rule that llama.cpp scales frequencies by, with transformers' names; {} for none, or one
    whose frequencies are written out. Unsupported for a rule that it has not."""
    rope = _rope(parts)
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    own = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)]
    own += ["truncate=False"] if rope.get("truncate") is False else []
    if kind not in SCALINGS or own:
        raise Unsupported(
            f"gguf: positions are scaled by {kind!r}{' with ' + own[0] if own else ''}; valid "
            f"there are {', '.join(SCALINGS)}, llama3 and none"
        )
    return rope


def _add_vocabulary(writer, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.begins)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
