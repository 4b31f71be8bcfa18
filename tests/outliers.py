"""Strong channel outliers in keys, planted without changing what a model computes.

    plant_outliers(model)                       # in place; the same logits, keys like Qwen2.5's

A few channels of Qwen2.5's keys are tens of times larger than the rest (transformers#35185: int4
per token ruins it). Scores are products over channels, so a channel of the keys may be made larger
if the same channel of the queries is made smaller. RoPE mixes a channel with its partner: both are
scaled alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from effattn.hf import anatomy


@torch.no_grad()
def plant_outliers(model, channels: Iterable[int] = (0, 5), factor: float = 32.0):
    """Scales `channels` of every head's keys, and their rotary partners, up by `factor`, those of
    the queries down.

    channels: dimensions of a head. A power of two as `factor` leaves the logits as they are, bit
    for bit; per-channel quantization cannot tell the difference either. Layers that norm their
    queries and keys have the norms' gains scaled. Returns the model."""
    for layer in anatomy.of(model).layers:
        partner = torch.arange(layer.head_dim)
        if layer.rotary_dims:
            real, imaginary = layer.rotary_pairs()
            partner[real], partner[imaginary] = imaginary.clone(), real.clone()
        chosen = sorted({one for channel in channels for one in (channel, int(partner[channel]))})
        scale = torch.ones(layer.head_dim, dtype=layer.k.like.dtype, device=layer.k.like.device)
        scale[chosen] = factor
        for projection, norm, by in (
            (layer.k, layer.k_norm, scale),
            (layer.q, layer.q_norm, 1 / scale),
        ):
            if norm is not None:  # one gain a channel, shared by the heads (Qwen3)
                norm.weight.mul_(by)
                continue
            projection.by_head.mul_(by[:, None])
            if projection.bias is not None:
                projection.bias.view(-1, layer.head_dim).mul_(by)
    return model
