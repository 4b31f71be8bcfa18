"""Folding: the final gates become part of the weights, once, so that slicing changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.hf import anatomy as hf
from effattn.prune.shearing.masks import Values
from effattn.prune.structural.keep import Keep


@torch.no_grad()
def fold(parts: hf.Anatomy, values: Values) -> None:
    """Multiplies the gates into the model's weights in place: without masks it then computes what
    it did with them, but for the norms, which take their mean over the kept dimensions only after
    slicing.

    A gate at a linear module's input scales its columns, one at its output its rows and bias: for
    heads and FFN dimensions that is the same map as scaling v_proj and up_proj, and holds for fused
    projections and biases too. The head reads gated hidden states: tied to the embedding it has the
    gates by that, untied it gets them here."""
    for layer in parts:
        # inputs of o_proj and down_proj first (their columns), then what both write into the stream
        o = layer.o.module
        if (z := values.get("heads")) is not None:
            o.weight.mul_(
                z[layer.index].repeat_interleave(o.in_features // z.shape[-1]).to(o.weight)
            )
        if (z := values.get("ffn")) is not None:
            down = layer.feed_forward.output
            down.weight.mul_(z[layer.index].to(down.weight))
        if not {"hidden", "layers"} & set(values):
            continue
        for linear in (o, layer.feed_forward.output):
            if (z := values.get("layers")) is not None:
                _scale_rows(linear, z[layer.index])
            if (z := values.get("hidden")) is not None:
                _scale_rows(linear, z)
    if (z := values.get("hidden")) is not None:
        parts.embeddings.weight.mul_(z.to(parts.embeddings.weight))
        if parts.head is not None:
            parts.head.weight.mul_(z.to(parts.head.weight))


def _scale_rows(linear, z: Tensor) -> None:
    linear.weight.mul_(z.to(linear.weight).reshape(-1, 1))
    if linear.bias is not None:
        linear.bias.mul_(z.to(linear.bias))


def keep(values: Values) -> Keep:
    """What is not 0, as `slice_model` takes it: heads and FFN dimensions of the layers that
    stay.
    """

    def of(axis: str) -> Tensor | None:
        return values[axis].nonzero().flatten().cpu() if axis in values else None

    def by_layer(axis: str) -> list[Tensor] | None:
        if axis not in values:
            return None
        staying = values[axis] if layers is None else values[axis].cpu()[layers]
        return [row.nonzero().flatten().cpu() for row in staying]

    layers = of("layers")
    return Keep(hidden=of("hidden"), heads=by_layer("heads"), ffn=by_layer("ffn"), layers=layers)
