"""Biases by distance for Triton kernels: what `Bias.values` says, jitted. Shared with the decode
kernels.

A bias is a function of distances d (int32, not negative) and of a head's parameters: pointer, how
many, the first two."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rules import Bias


@triton.jit
def alibi(d, params_ptr, n, slope, _):
    """-m d (arXiv:2108.12409)."""
    return -slope * d.to(tl.float32)


@triton.jit
def kerple_log(d, params_ptr, n, r1, r2):
    """-r1 log(1 + r2 d) (arXiv:2205.09921)."""
    return -r1 * tl.log(1 + r2 * d.to(tl.float32))


@triton.jit
def kerple_power(d, params_ptr, n, r1, r2):
    """-r1 d^r2 (arXiv:2205.09921), 0 at d = 0."""
    return tl.where(d > 0, -r1 * tl.exp2(r2 * tl.log2(tl.maximum(d, 1).to(tl.float32))), 0.0)


@triton.jit
def table(d, params_ptr, n, first, second):
    """A number for each distance, the last one from n - 1 on."""
    return tl.load(params_ptr + tl.minimum(d, n - 1))


BIASES: dict[str | None, Any] = {
    None: None,
    "alibi": alibi,
    "kerple_log": kerple_log,
    "kerple_power": kerple_power,
    "table": table,
}


@triton.jit
def params_of(params_ptr, h, step, n):
    """What a bias function takes besides distances, for head h: a scalar, or rows (M, 1)."""
    params_ptr += h * step
    return params_ptr, n, tl.load(params_ptr), tl.load(params_ptr + tl.minimum(n, 2) - 1)


@triton.jit
def biases_of(params_ptr, h, step, n, scale, BIAS: tl.constexpr, RULE: tl.constexpr):
    """(`params_of` head h, what a bias is multiplied by to be in the unit of the scores). Without
    BIAS something that nobody reads: Triton 3.6 compiles no jitted function that returns None.
    """
    if BIAS is None:
        return scale
    else:
        return params_of(params_ptr, h, step, n), 1.0 if RULE is not None else 1 / scale


def arguments(bias: Bias | None) -> tuple[Tensor | None, int, int]:
    """params, step and n for a launch: fp32, the last dimension dense. ValueError if gradients are
    wanted.
    """
    if bias is None:
        return None, 0, 0
    if torch.is_grad_enabled() and bias.params.requires_grad:
        raise ValueError(
            "bias.params: the Triton kernels have no gradient for it; valid are a detached tensor "
            "and impl='torch'"
        )
    params = bias.params.float().contiguous()
    return params, params.shape[1] if params.shape[0] > 1 else 0, params.shape[1]
