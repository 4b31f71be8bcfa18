"""xPOS (arXiv:2212.10554): a rotation whose frequencies fade with the distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.positions.base import Trained, check_number, register
from effattn.positions.rope import OwnRope


@register("xpos")
@dataclass(frozen=True)
class XPos(OwnRope):
    """xPOS (arXiv:2212.10554): the model's rotation, with a pair of dimensions multiplied by
    zeta_i^(D/scale) at distance D, where zeta_i = (2i + gamma R)/((1 + gamma) R), gamma = 0.4.

    Queries hold zeta^((n - c)/scale), keys zeta^((c - n)/scale), around a centre c of the sequence
    that keeps both finite: it moves as the sequence grows, so cached keys are raw, and every step
    turns all of them. In float16 up to some 4,000 tokens can lie on each side of it."""

    scale: float = 512.0
    gamma: float = 0.4

    causal_only = True
    by_distance = False

    def __post_init__(self):
        check_number("xpos", "scale", self.scale, above=True)
        check_number("xpos", "gamma", self.gamma, above=True)

    def fade(
        self, x: Tensor, positions: Tensor, centre: Tensor | float, trained: Trained, keys: bool
    ) -> Tensor:
        """x (B, H, T, D) at positions (T,) or (B, T), times zeta^(+-(n - c)/scale). Returns x's
        dtype.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        dims = trained.dims
        pair = torch.arange(0, dims, 2, dtype=torch.float64, device=x.device)
        log_zeta = ((pair + self.gamma * dims) / ((1 + self.gamma) * dims)).log()
        # both dimensions of a pair fade alike; those that do not turn do not fade
        log_zeta = log_zeta.repeat_interleave(2) if trained.interleaved else log_zeta.repeat(2)
        log_zeta = torch.cat([log_zeta, log_zeta.new_zeros(x.shape[-1] - dims)])
        power = (positions.double() - centre) / self.scale
        fade = torch.exp((-power if keys else power)[..., None] * log_zeta).to(dtype)
        return (x.to(dtype) * (fade[:, None] if fade.ndim == 3 else fade)).to(x.dtype)
