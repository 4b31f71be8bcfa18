"""From the definition: each output is a sum over the set bits of its row."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import SEGMENT


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N), one weight after the other, in fp64."""
    values, masks, _ = packed
    outputs, width = masks.shape
    y = torch.zeros(len(x), outputs, dtype=torch.float64, device=x.device)
    place = 0
    for n in range(outputs):
        for segment in range(0, width, SEGMENT):
            wide = min(SEGMENT, width - segment)  # bytes, and columns of a plane
            for c in range(8):
                for b in range(wide):
                    if int(masks[n, segment + b]) >> c & 1:
                        column = 8 * segment + c * wide + b
                        y[:, n] += values[place].double() * x[:, column].double()
                        place += 1
    return (y if bias is None else y + bias.double()).to(x.dtype)
