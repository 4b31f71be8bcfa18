"""Weights in 4 or 8 bits by bitsandbytes, beside a compressed cache.

    effattn.quant.quantize_weights(model, "nf4")               # in place
    model = effattn.quant.load_weights("owner/name", "int8")   # quantized while it is read
    effattn.swap(model, cache="int4")                          # both: `effattn.measure` counts both
    effattn.save(model, "out")                                 # plain transformers loads it

The linear layers of the attention and the FFN become bitsandbytes' own modules; embeddings, the
head and norms stay. "nf4": 4-bit normal floats in blocks of 64, absmax in fp32 (QLoRA,
arXiv:2305.14314); "int8": a scale for each row, activations in int8 too, outlying ones in half
precision (LLM.int8(), arXiv:2208.07339)."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy, packing, placement
from effattn.hf.adapters import require_own_weights
from effattn.hf.weights import is_plain, not_plain

KINDS = ("nf4", "int8")


@torch.no_grad()
def quantize_weights(
    model: nn.Module, kind: str = "nf4", only: Collection[nn.Module] | None = None
) -> nn.Module:
    """Replaces the linears of every layer's attention and FFN, in place, where the model is.
    Returns the model. kind: "nf4" (QLoRA, arXiv:2305.14314) or "int8" (LLM.int8(),
    arXiv:2208.07339). only: those of these linears; the config then names the others.

    They are new modules, without the hooks that the old ones had; they do not train. The model is
    then what transformers makes of `quantization_config`: it saves and loads as such. Raises
    ValueError for an unknown kind, and Unsupported, before anything is changed, where bitsandbytes
    is missing and for models whose weights are quantized already, structured or stacked (experts).
    """
    check_choice("kind", kind, KINDS)
    require_own_weights(model)
    placement.require_here(model, "quantize_weights")
    bnb = _bitsandbytes()
    parts = anatomy.of(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise Unsupported(f"{type(model).__name__}: its weights are quantized already")
    every = _linears(parts)
    linears = every if only is None else [one for one in every if one in set(only)]
    dtype, names = (
        parts.embeddings.weight.dtype,
        {module: name for name, module in model.named_modules()},
    )
    for old in linears:
        model.set_submodule(names[old], _packed(bnb, old, kind, dtype))
    left = [names[one] for one in every if one not in set(linears)]
    config = _config(kind, dtype, _left_out(model, left) if left else None)
    from transformers.quantizers import AutoHfQuantizer

    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.hf_quantizer.postprocess_model(model)
    return packing.steady(model)


def load_weights(
    path: str | Path, kind: str = "nf4", dtype: torch.dtype | str = "auto"
) -> nn.Module:
    """The causal LM of a plain checkpoint ("embedded", a folder or a hub name), its linears
    quantized one by one while they are read: the whole is never in full precision. dtype: of the
    rest. In eval mode.

    Raises as `quantize_weights` does, and ValueError for what cannot be loaded.
    """
    from effattn.hf import loading, source

    check_choice("kind", kind, KINDS)
    _bitsandbytes()
    name, dtype = source.resolve(path), source.dtype_of(dtype)
    found = source.read_config(name, path)
    if hasattr(found, source.KEY):
        raise Unsupported(
            f"{path}: a swapped checkpoint; valid is effattn.load, then quantize_weights"
        )
    if getattr(found, "quantization_config", None) is not None:
        raise Unsupported(f"{path}: its weights are quantized already; valid is effattn.load")
    compute = found.dtype if dtype == "auto" else dtype
    loading.check_causal(found, path)
    packed = _config(kind, compute or torch.float32)
    return packing.steady(loading.build(name, found, dtype, quantization_config=packed))


def _bitsandbytes():
    try:
        import bitsandbytes
    except ImportError as error:
        raise Unsupported(
            f"weights: bitsandbytes cannot be imported ({error}); pip install bitsandbytes"
        ) from None
    # which warns at each call that activations are cast to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def _left_out(model: nn.Module, linears: list[str]) -> list[str]:
    """What a config must name so that these linears stay: they, and the head, which transformers
    leaves by itself only where nothing is named."""
    head = model.get_output_embeddings()
    return [*(name for name, one in model.named_modules() if one is head), *linears]


def _config(kind: str, dtype: torch.dtype, left_out: list[str] | None = None):
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_out,
    )


def _linears(parts: anatomy.Anatomy) -> list[nn.Linear]:
    """Every linear of the layers' attention and FFN. Unsupported for what is none."""
    found: list[nn.Linear] = []
    for layer in parts.layers:
        for projection in layer.qkv_modules:
            if not is_plain(projection):
                raise Unsupported(
                    f"weights: layer {layer.index}: {type(projection).__name__} is no plain "
                    "linear; quantize the model's own weights"
                )
        for module in (layer.attention, layer.o.module, layer.ffn):
            if (odd := not_plain(module)) is not None:
                raise Unsupported(
                    f"weights: layer {layer.index}: {odd} is no plain linear; quantize the "
                    "model's own weights"
                )
            if any(p.dim() > 2 for p in module.parameters()):
                raise Unsupported(
                    f"weights: layer {layer.index} ({type(module).__name__}) stacks experts in "
                    "one parameter, which bitsandbytes does not quantize"
                )
            # a part that a layer has not answers with linears of no numbers
            found += [one for one in module.modules() if is_plain(one) and one.weight.numel()]
    return list(dict.fromkeys(found))  # once each: layers may share modules


def _packed(bnb, old: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' module with the weights of `old`, quantized on its device."""
    sizes, bias, device = (
        (old.in_features, old.out_features),
        old.bias is not None,
        old.weight.device,
    )
    # made without memory for weights, which would be full precision ones for a moment
    with torch.device("meta"):
        if kind == "nf4":
            new = bnb.nn.Linear4bit(
                *sizes, bias, dtype, compress_statistics=False, quant_type="nf4"
            )
            weight = bnb.nn.Params4bit(
                old.weight.data,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=False,
                module=new,
            )
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=6.0)
            weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    new.weight = weight.to(device)  # quantizes
    new.bias = old.bias
    return new.requires_grad_(False).train(old.training)
