"""Gradients in the numbers that their forward pass was in, also where `backward()` is called inside
`torch.autocast`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def as_given(backward: Callable) -> Callable:
    """The `backward` of an autograd Function, without autocast: it would multiply in half precision
    what the function sums in float32, in place, so that dtypes no longer fit."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        kind = next((x.device.type for x in grads if isinstance(x, Tensor)), "cpu")
        if not torch.is_autocast_enabled(kind):
            return backward(ctx, *grads)
        with torch.autocast(kind, enabled=False):
            return backward(ctx, *grads)

    return run
