"""From the definition: each output is a sum over the groups of four, of the two weights that are
kept in each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N), one weight after the other, in fp64."""
    values, indices = packed
    outputs, _, groups = values.shape
    y = torch.zeros(len(x), outputs, dtype=torch.float64, device=x.device)
    for n in range(outputs):
        for g in range(groups):
            byte = int(indices[n, g % (groups // 2)])
            nibble = byte & 15 if g < groups // 2 else byte >> 4
            for plane, position in enumerate((nibble & 3, nibble >> 2)):
                y[:, n] += values[n, plane, g].double() * x[:, 4 * g + position].double()
    return (y if bias is None else y + bias.double()).to(x.dtype)
