"""Rotary position embedding (RoPE, arXiv:2104.09864) as a rule that a backend calls on raw queries
and keys.

    rope = Rope(inv_freq)                           # (R/2,), R = the dimensions of a head that turn
    y = attn(q, k, v, rotary=rope)                  # q, k raw
    q, k = rope(q, k, q_positions, k_positions)     # what the backend does with it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.positions.base import Rotation, register


@dataclass(frozen=True, eq=False)
class Rope:
    """RoPE (arXiv:2104.09864): turns the first `dims` dimensions of every head, pair i by the angle
    position * inv_freq[i].

    inv_freq (dims/2,), or (B, dims/2) where rows differ. attention_scaling multiplies what is
    turned (YaRN's temperature), a number, or (B,) where rows differ. Pairs are (i, i + dims/2), or
    (2i, 2i + 1) when `interleaved` (GLM, Cohere). Angles and products are fp32 (fp64 for fp64
    inputs), the results have the inputs' dtype."""

    inv_freq: Tensor
    attention_scaling: float | Tensor = 1.0
    dims: int | None = None
    interleaved: bool = False

    def __post_init__(self):
        turned = 2 * self.inv_freq.shape[-1]
        if self.inv_freq.ndim not in (1, 2) or self.dims not in (None, turned):
            raise ValueError(
                f"dims: got {self.dims} with inv_freq {tuple(self.inv_freq.shape)}, valid is "
                "twice as many"
            )
        object.__setattr__(self, "dims", turned)

    def __call__(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q (B, Hq, Tq, D) and k (B, Hkv, Tk, D), turned. Positions are int64, (T,) or (B, T)."""
        return self.turn(q, q_positions), self.turn(k, k_positions)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D) at positions (T,) or (B, T), which need not be whole numbers; returned in
        x's shape and dtype."""
        # in half precision, positions above 256 (bf16) would share angles
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        inv_freq = self.inv_freq.to(x.device, dtype)
        angle = positions[..., None].to(dtype) * (
            inv_freq if inv_freq.ndim == 1 else inv_freq[:, None]
        )
        if angle.ndim == 3:  # a row's own positions or frequencies: the same for all of its heads
            angle = angle[:, None]
        scaling = self.attention_scaling
        if isinstance(scaling, Tensor):
            scaling = scaling.to(x.device, dtype)[:, None, None, None]
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        part, rest = x[..., : self.dims].to(dtype), x[..., self.dims :]
        if self.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            part = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = part.chunk(2, dim=-1)
            part = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        part = part.to(x.dtype)
        return torch.cat([part, rest], dim=-1) if rest.shape[-1] else part


@register("rope")
@dataclass(frozen=True)
class OwnRope(Rotation):
    """The rotation that the model has: theta_i = b^(-2i/R), or what its config makes of it."""

    from_plain = False

    def frequencies(self, trained, length=None):
        return (trained.thetas() if trained.inv_freq is None else trained.inv_freq), trained.scaling
