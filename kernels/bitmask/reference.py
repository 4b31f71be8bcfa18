"""From the definition: each output is a sum over the set bits of its row."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N), one weight after the other, in fp64."""
    values, masks, _ = packed
    outputs, width = masks.shape
    y = torch.zeros(len(x), outputs, dtype=torch.float64, device=x.device)
    place = 0
    for n in range(outputs):
        for b in range(width):
            for c in range(8):
                if int(masks[n, b]) >> c & 1:
                    y[:, n] += values[place].double() * x[:, c * width + b].double()
                    place += 1
    return (y if bias is None else y + bias.double()).to(x.dtype)
