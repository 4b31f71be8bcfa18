"""Sandwich (arXiv:2212.10356): the inner products of sinusoidal positions as a bias, without
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.kernels.flash.rules import Bias
from effattn.positions.base import Added, check_count, register


@register("sandwich")
@dataclass(frozen=True)
class Sandwich(Added):
    """Sandwich (arXiv:2212.10356): lambda_h sum_i cos(D b^(-2i/dims)), i = 0 .. dims/2 - 1, with
    lambda_h = H/(8h), h = 1 .. H, and b = 10000.
    """

    dims: int = 128

    def __post_init__(self):
        check_count("sandwich", "dims", self.dims, least=2)

    def bias(self, trained, tokens, learned):
        # a table by distance, made in fp64: cosines of large angles lose their digits
        thetas = 10000.0 ** (-torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims)
        sums = sum((torch.arange(tokens, dtype=torch.float64) * theta).cos() for theta in thetas)
        heads = torch.arange(1, trained.heads + 1, dtype=torch.float64)
        return Bias("table", (trained.heads / (8 * heads)[:, None] * sums).float())
