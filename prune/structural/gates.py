"""Factors on heads and FFN dimensions of a live model: 1 changes nothing, 0 takes one out,
gradients say what it does.

    with gated(anatomy.of(model), heads=ones, ffn=None):
        model(input_ids=ids)

transformers 5 has no `head_mask` for most classes. A head ends in its columns of o_proj, an FFN
dimension in its column of the FFN's output module: hooks multiply what these two take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from effattn.hf.anatomy import Anatomy


@contextmanager
def gated(
    parts: Anatomy,
    heads: Sequence[Tensor | None] | None = None,
    ffn: Sequence[Tensor | None] | None = None,
) -> Iterator[None]:
    """While open, the model computes with these gates; None: without.

    heads: a tensor (H,) of query heads for each layer, or (B, H) for each of a batch's rows. ffn:
    (F,) or (B, F). Gradients flow into them. What is given for the wrong number of layers or of
    heads is a ValueError."""
    handles = []
    for name, gates in (("heads", heads), ("ffn", ffn)):
        if gates is not None and len(gates) != len(parts.layers):
            raise ValueError(
                f"{name}: got gates for {len(gates)} layers, the model has {len(parts.layers)}"
            )
    try:
        for layer in parts:
            if heads is not None and (given := heads[layer.index]) is not None:
                gate = _check("heads", given, layer.heads)
                handles.append(_multiply(layer.o.module, gate, layer.head_dim))
            if ffn is not None and (given := ffn[layer.index]) is not None:
                gate = _check("ffn", given, layer.feed_forward.size)
                handles.append(_multiply(layer.feed_forward.output, gate, 1))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(name: str, gate: Tensor, size: int) -> Tensor:
    if gate.dim() not in (1, 2) or gate.shape[-1] != size:
        raise ValueError(
            f"{name}: got gates {tuple(gate.shape)}, valid is ({size},) or (batch, {size})"
        )
    return gate


def _multiply(module: nn.Module, gate: Tensor, width: int):
    """A pre-hook that multiplies the input's features, `width` of them by each gate."""

    def hook(_, args):
        x = args[0]
        factor = gate.to(x).repeat_interleave(width, -1)
        # (width x gates,) for all rows alike, or a row of factors for each row of the batch
        if gate.dim() == 1:
            return (x * factor, *args[1:])
        rows = x.reshape(len(gate), -1, x.shape[-1])  # OPT's FFN takes (B·T, F)
        return ((rows * factor[:, None]).view_as(x), *args[1:])

    return module.register_forward_pre_hook(hook)
