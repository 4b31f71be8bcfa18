"""First derivatives only, and loudly so.

torch's own `once_differentiable` refuses a second derivative where the incoming gradient has one
itself. That of `attention(q, k, v).sum()` is a constant, and a penalty on such a gradient would
silently lose what attention does to it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

MESSAGE = (
    "effattn: got a second derivative (of a gradient made with create_graph=True), which its "
    "kernels do not have; valid are first derivatives"
)


class _Refused(torch.autograd.Function):
    """The first `count` tensors as they are, which depend on all of them, and have no gradient."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(MESSAGE)


def once_differentiable(backward: Callable) -> Callable:
    """The `backward` of an autograd Function, whose own gradient is refused with a RuntimeError."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        several = isinstance(found, tuple)
        outputs = found if several else (found,)
        # on what they depend, so that none is taken for a constant
        inputs = [x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor)]
        given = [x for x in outputs if x is not None]
        refused = iter(_Refused.apply(len(given), *given, *(x for x in inputs if x.requires_grad)))
        outputs = tuple(x if x is None else next(refused) for x in outputs)
        return outputs if several else outputs[0]

    return run
