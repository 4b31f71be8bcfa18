"""Hadamard rotation of keys and values before they are quantized (QuaRot, arXiv:2404.00456).

    # spreads a channel's outliers over the head dimension; hadamard(hadamard(k)) is k
    k = hadamard(k)
    # the values' rotation as a part of the weights, at no cost afterwards
    fold_values(model)

Scores do not change when queries and keys are both rotated, and outputs do not when the values'
rotation is undone after the weighted sum: the rotation is orthogonal. A cache with `rotate` does
both as it reads (`quant.packed.state`)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported


def block_of(dim: int) -> int:
    """The largest power of two that divides `dim`: how many neighbouring dimensions are rotated
    among themselves. 128 for 128, 16 for 80. ValueError for an odd head dimension, which would not
    be rotated at all."""
    block = dim & -dim
    if block < 2:
        raise ValueError(
            f"rotate: got head dimension {dim}, valid are even ones (best are powers of two)"
        )
    return block


def hadamard(x: Tensor) -> Tensor:
    """The normalised Walsh-Hadamard transform of the last dimension, in blocks of `block_of`
    dimensions; its own inverse (QuaRot, arXiv:2404.00456). Any shape (..., D), returned in x's
    dtype; computed in at least fp32. ValueError for an odd D."""
    block = block_of(x.shape[-1])
    work = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(work).unflatten(-1, (-1, block))
    # a graph keeps constants itself, and cannot trace the cache
    matrix = _matrix.__wrapped__ if torch.compiler.is_compiling() else _matrix
    return (rows @ matrix(block, work, x.device)).flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix over sqrt(size): (size, size), symmetric and orthogonal.

    One product with it is one launch; the fast transform's log2(size) steps are two each.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(matrix) < size:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)]
        )
    return (matrix * size**-0.5).to(dtype)


@torch.no_grad()
def fold_values(model: nn.Module) -> nn.Module:
    """Rotates the values of every layer by its weights, in place: rows of v_proj, and columns of
    o_proj back again.

    The model computes the same function as before, up to one rounding of the weights, and is saved
    as plain transformers. Like a conversion of heads it is part of the weights then:
    `effattn.restore` does not undo it, a second call does. A cache needs to rotate the keys only:
    "int4(rotate='k')". Returns the model.

    Raises, before anything is changed, Unsupported where something stands between v_proj and
    o_proj, and ValueError for an odd head dimension. Source: QuaRot, arXiv:2404.00456."""
    from effattn.hf import anatomy, hooks
    from effattn.hf.adapters import require_own_weights

    require_own_weights(model)
    parts = anatomy.of(model)
    # all checks of all layers first: a model is changed as a whole or not at all
    for layer in parts.layers:
        block_of(layer.head_dim)
        if layer.clip is not None:
            raise Unsupported(
                f"{type(model).__name__}: layer {layer.index} clips its values (clip_qkv), which "
                "a rotation in the weights would change; valid is rotate=True, which rotates as "
                "it stores"
            )
        if hooks.GLOBAL in layer.attention._modules:
            raise Unsupported(
                f"{type(model).__name__}: layer {layer.index} has global projections beside its "
                "own, whose values would not be rotated; valid is effattn.restore(model) first, "
                "or rotate=True"
            )
        for projection in (layer.v, layer.o):
            projection.by_head  # noqa: B018 - raises where there are no rows by head
    for layer in parts.layers:
        value, out = layer.v, layer.o
        value.by_head.copy_(_turned(value.by_head, 1))  # (kv_heads, head_dim, hidden)
        if value.bias_by_head is not None:
            value.bias_by_head.copy_(_turned(value.bias_by_head, 1))
        out.by_head.copy_(_turned(out.by_head, 2))  # (heads, hidden, head_dim)
    return model


def _turned(weight: Tensor, dim: int) -> Tensor:
    """`hadamard` along a dimension, in fp64."""
    return hadamard(weight.double().movedim(dim, -1)).movedim(-1, dim).to(weight.dtype)
