"""The O re-fit: after merging, the output projection is solved again by least squares.

O' minimises sum |O' z - y|^2 + lambda sum_j s_j |O'_j - O_0j|^2 over the calibration tokens, where
z are the new model's o_proj inputs, s_j the sum of z_j^2, y the old model's o_proj outputs (without
bias; where they are added to the hidden states, with what the new model's already lack of the old
one's) and O_0 the merged projection: O'^T = (Z^T Z + lambda S)^-1 (Z^T Y + lambda S O_0^T), where
S = diag(s). Since O_0 is one of the candidates, the error on the calibration tokens never rises.

H heads of size d, D hidden size; the sums over tokens Z^T Z (H·d, H·d) and Z^T Y (H·d, D) are all
that is kept of them."""

from __future__ import annotations

import torch

from effattn.calibration.statistics import SecondMoment
from effattn.damping import damped

# lambda. SmolLM2 from 3 K/V heads to 1 by 16,384 tokens loses 1.33 nats at 0.001, 1.22 at 0.01; the
# embedded model, whose layers have fewer inputs, the same at both.
DAMPING = 1e-2


def lag(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What the new model's hidden states (..., D) lack of the old one's, (n, D) on the new one's
    device. In fp32: beside a few massive values half precision would round the difference away."""
    return (old.to(new.device).float() - new.float()).flatten(0, -2)


class OutputRefit:
    """Collects z and y, tells the error of any output projection on them, and solves for the
    best.
    """

    def __init__(self) -> None:
        self.gram, self.cross, self.energy = SecondMoment(), SecondMoment(), 0.0

    def add(self, z: torch.Tensor, y: torch.Tensor) -> None:
        """z (n, H·d) and y (n, D): the same tokens through the new and the old layer."""
        self.gram.add(z)
        self.cross.add(z, y)
        self.energy += float(y.double().square().sum())

    def error(self, output: torch.Tensor) -> float:
        """sum |O z - y|^2 / sum |y|^2 for output (D, H·d)."""
        # |O z - y|^2 summed over tokens, from the sums alone: tr(O G O^T) - 2 tr(O C) + |y|^2
        output = output.detach().double()
        squared = (
            ((output @ self.gram.sum) * output).sum()
            - 2 * (output.T * self.cross.sum).sum()
            + self.energy
        )
        return float(squared.clamp_min(0) / max(self.energy, 1e-300))

    def solve(self, output: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
        """The re-fitted projection (D, H·d), fp64. damping: lambda. Raises FloatingPointError when
        the activations are not finite.
        """
        gram, start = self.gram.sum, output.detach().double()
        if not torch.isfinite(gram).all() or not torch.isfinite(self.cross.sum).all():
            raise FloatingPointError("the calibration activations contain NaN or infinity")
        system = damped(gram, damping)
        pull = system.diagonal() - gram.diagonal()  # 1 for an input that was always 0: it stays
        factor = torch.linalg.cholesky(system)
        return torch.cholesky_solve(self.cross.sum + pull[:, None] * start.T, factor).T
