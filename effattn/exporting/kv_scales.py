"""Calibrated scales of an 8-bit float cache, as vLLM reads them from a checkpoint.

    scales = measure(model, tokens)      # {"model.layers.0.self_attn.k_proj.k_scale": tensor, ...}

A server that caches in fp8 without scales cuts off what is beyond 448. With them the largest key of
the calibration text is the largest code; one number for the keys of a layer, one for its values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported
from effattn.hf import anatomy

FORMAT = "fp8"
LARGEST = 448.0  # of e4m3
WINDOW = 512  # tokens that are read at once
TOKENS = 8192  # of the text that is read where none is given
# what compressed-tensors, which vLLM reads this by, calls it
SCHEME: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "quantization_status": "compressed",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    },
}


def check(parts: anatomy.Anatomy, skip: Collection[int]) -> None:
    """Unsupported for projections that are one matrix; ValueError for layers that are not there, or
    all of them."""
    layers = [layer for layer in parts.layers if layer.attends]
    if any(layer.fused for layer in layers):
        raise Unsupported(
            f"kv_cache: {type(parts.model).__name__} has one matrix for queries, keys and values, "
            "and no place for their scales"
        )
    valid = range(len(parts.layers))
    if wrong := sorted(index for index in skip if index not in valid):
        raise ValueError(f"kv_skip: got layer {wrong[0]}, valid are 0 to {valid[-1]}")
    if len(set(skip)) == len(valid):
        raise ValueError("kv_skip: got all layers; leave kv_cache away instead")


@torch.no_grad()
def measure(model: nn.Module, tokens: Tensor, skip: Collection[int] = ()) -> dict[str, Tensor]:
    """Scales, float32 (1,), of the layers that are not in `skip`. tokens: int64 (N,).

    ValueError for a text of fewer than two tokens."""
    from transformers import DynamicCache

    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"calibration: got {tuple(tokens.shape)}, valid are two tokens and more")
    parts = anatomy.of(model)
    window = min(WINDOW, parts.trained_length or WINDOW)
    largest: dict[int, list[float]] = {}
    for piece in tokens.split(window):
        cache = DynamicCache()
        model(input_ids=piece[None].to(model.device), past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            if not layer.is_initialized:
                continue
            seen = largest.setdefault(index, [0.0, 0.0])
            for place, held in enumerate((layer.keys, layer.values)):
                seen[place] = max(seen[place], float(held.abs().max()))
    names = {id(module): name for name, module in model.named_modules()}
    scales = {}
    for index, found in largest.items():
        if index in skip:
            continue
        layer = parts.layers[index]
        for kind, module, most in zip("kv", (layer.k.module, layer.v.module), found, strict=True):
            # a layer of zeros has any scale
            scales[f"{names[id(module)]}.{kind}_scale"] = torch.tensor(
                [(most or LARGEST) / LARGEST]
            )
    return scales


def command(skip: Collection[int]) -> str:
    """The server's own options for such a checkpoint."""
    left = f" --kv-cache-dtype-skip-layers {' '.join(map(str, sorted(set(skip))))}" if skip else ""
    return f"--kv-cache-dtype {FORMAT}{left}"
