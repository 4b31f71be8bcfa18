"""Latent keys and values in a live model: their modules, in the places of k_proj and v_proj.

`effattn.projections.latent` says what they compute, `effattn.heads.latent` finds their weights."""

from __future__ import annotations

from torch import nn

from effattn.hf import anatomy
from effattn.hf.layer import Layer
from effattn.hf.names import LATENT
from effattn.hf.norms import KeyNorm
from effattn.projections.latent import LatentLinear, LatentMemory, check_spec


def put(layer: Layer, rank: int) -> tuple[LatentMemory, LatentLinear, LatentLinear]:
    """Gives a layer the modules of a latent of this rank, whose weights mean nothing yet: what
    remembers, and what makes keys and values."""
    old, rows = layer.k.module, layer.kv_heads * layer.head_dim
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    memory = LatentMemory(old.in_features, rank, **like)
    key, value = (LatentLinear(memory.down, rows) for _ in range(2))
    norm = None if layer.k_norm is None else KeyNorm(layer.k_norm)
    memory.attach(key, value, layer.kv_heads, norm)
    for module in (memory, key, value):
        module.train(layer.attention.training)
    layer.attention.add_module(LATENT, memory)
    for name, module in (("k", key), ("v", value)):
        parent, _, leaf = getattr(layer.family, name).rpartition(".")
        setattr(layer.attention.get_submodule(parent), leaf, module)
    return memory, key, value


def record(model: nn.Module) -> dict[str, str]:
    """What a checkpoint must say so that `rebuild` can make the modules: layer -> its heads."""
    if not any(isinstance(module, LatentMemory) for module in model.modules()):
        return {}
    held = {str(layer.index): layer.latent for layer in anatomy.of(model)}
    return {index: one.spec for index, one in held.items() if one is not None}


def rebuild(model: nn.Module, recorded: dict[str, str]) -> None:
    """Puts latents of the recorded ranks into a new model, whose weights mean nothing yet.

    ValueError for records that do not fit the model.
    """
    where = "config.json: effattn: heads"
    layers = {str(layer.index): layer for layer in anatomy.of(model)} if recorded else {}
    for index, spec in recorded.items():
        layer = layers.get(index)
        if layer is None or not isinstance(layer.k.module, nn.Linear):
            raise ValueError(f"{where}: {index!r}: {spec!r} does not fit the model")
        put(layer, check_spec(f"{where}: {index}", spec, layer.k.module.in_features))
