"""q, k and v as attention gets them, but for RoPE: projected, normalised, clipped.

A turn or a scale that is folded into a projection is undone on the other side only where nothing
stands between the projection and attention. Where a norm or a clip does, what comes of it is
computed here, so that it can be measured.

N: tokens; D: hidden size; heads, d: of q, k or v, and the size of one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from effattn.hf.anatomy import Layer
from effattn.hf.norms import normalised


def is_linear(layer: Layer) -> bool:
    """Whether q, k and v are linear in the layer's normalised input, apart from RoPE."""
    return layer.q_norm is None and layer.k_norm is None and layer.clip is None


@torch.no_grad()
def attended(layer: Layer, name: str, x: Tensor) -> Tensor:
    """What becomes of the attention module's inputs x (N, D) as "q", "k" or "v": (N, heads, d), in
    x's dtype.
    """
    projection = getattr(layer, name)
    states = torch.einsum("nD,hdD->nhd", x, projection.by_head.to(x))
    if projection.bias_by_head is not None:
        states = states + projection.bias_by_head.to(x)
    norm = {"q": layer.q_norm, "k": layer.k_norm}.get(name)
    if norm is not None:
        norm = copy.deepcopy(norm).to(states)
        states = normalised(norm, states.transpose(0, 1)[None])[0].transpose(0, 1)
    return states if layer.clip is None else states.clamp(-layer.clip, layer.clip)
