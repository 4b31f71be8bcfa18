"""What a model's attention really gets: q, k and v of each layer, rotated, and the exact attention
over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.hf.placement import input_device
from effattn.kernels import flash
from effattn.surgery.swapping import active, restore, swap


@torch.no_grad()
def projections_of(
    model: nn.Module,
    tokens: Tensor,
    layers: Sequence[int] | None = None,
    scaled: bool = False,
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """layer -> q (B, Hq, T, D), k and v (B, Hkv, T, D) as its attention gets them, for token ids
    (B, T) int64.

    scaled: q such that `exact` is the layer's attention where the model has a scale of its own
    (Granite, Gemma). The model must not be swapped (ValueError), and is as before afterwards.
    """
    if active(model) is not None:
        raise ValueError(
            "model: it is swapped; its own attention is needed here: effattn.restore(model) first"
        )
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    swap(model, "dense")
    try:
        handles = []
        for layer in hf.of(model):
            if layers is None or layer.index in layers:
                backend = getattr(layer.attention, hooks.ATTRIBUTE).backend

                def note(_, args, kwargs, index=layer.index):
                    q, k, v = args[:3]
                    if scaled and kwargs.get("scale") is not None:
                        q = q * (kwargs["scale"] * q.shape[-1] ** 0.5)
                    found[index] = (q, k, v)

                handles.append(backend.register_forward_pre_hook(note, with_kwargs=True))
        model.base_model(input_ids=tokens.to(input_device(model)), use_cache=False)
        for handle in handles:
            handle.remove()
    finally:
        restore(model)
    return dict(sorted(found.items()))


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention, (B, Hq, T, Dv). scale: D^-0.5 by default; softcap: Gemma 2's."""
    return flash.attention(q, k, v, causal=causal, scale=scale, softcap=softcap)


def own_scores(layer: hf.Layer) -> dict[str, float | None]:
    """How a layer makes scores of q and k as it gets them, for `exact`: its scale and softcap, None
    for what it has not of its own."""
    return {"scale": getattr(layer.attention, "scaling", None), "softcap": layer.softcap}
