"""The hard concrete distribution: gates in [0, 1] that are exactly 0 or 1 with a probability one
can differentiate.

Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization",
arXiv:1712.01312, equations 10 to 12, with the constants of Sheared LLaMA (arXiv:2310.06694)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA = 2 / 3  # the temperature of the concrete distribution
LOW, HIGH = -0.1, 1.1  # it is stretched to this interval and clipped to [0, 1], hence its two atoms
# of log alpha: the sharpness of the deterministic gate, as in the released code of Sheared LLaMA
SETTLED = 0.8
BOUND = math.log(100)  # |log alpha| stays below, so that no gate is lost for gradients


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates z in [0, 1] of log_alpha's shape and dtype, from uniform noise in [0, 1] of the same
    shape.
    """
    # equations 10 to 12: a concrete variable, stretched to (LOW, HIGH), clipped to [0, 1]; the
    # logit of 0 or 1 would be infinite
    tiny = torch.finfo(uniform.dtype).eps
    noise = uniform.clamp(tiny, 1 - tiny).logit()
    return (torch.sigmoid((noise + log_alpha) / BETA) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0), of log_alpha's shape: what an L0 penalty counts (equation 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor, keep: int | None = None) -> Tensor:
    """Gates without noise, of log_alpha's shape: sigmoid(0.8 log alpha / beta), the lowest of each
    row (the last dimension) set to 0.

    keep: how many stay in each row. None: as many as the row's P(z > 0) sum up to, rounded, and at
    least one."""
    z = torch.sigmoid(SETTLED * log_alpha / BETA)
    size = z.shape[-1]
    order = z.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(size, device=z.device).expand_as(order)
    )
    if keep is None:
        kept = open_probability(log_alpha).sum(-1, keepdim=True).round().clamp(1, size)
    else:
        kept = torch.full((), keep, device=z.device)
    return torch.where(rank < kept, z, 0)
