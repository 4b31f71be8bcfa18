"""The O re-fit: after merging, the output projection is solved again by least squares.

O' minimises sum |O' z - y|^2 + lambda |O' - O_0|^2 over the calibration tokens, where z are the new
model's o_proj inputs, y the old model's o_proj outputs (without bias) and O_0 the merged
projection: O'^T = (Z^T Z + lambda I)^-1 (Z^T Y + lambda O_0^T). Since O_0 is one of the candidates,
the error on the calibration tokens never rises.

H heads of size d, D hidden size; the sums over tokens Z^T Z (H·d, H·d) and Z^T Y (H·d, D) are all
that is kept of them."""

from __future__ import annotations

import torch

from effattn.calibration.statistics import SecondMoment

DAMPING = 1e-3  # lambda, as a share of the mean diagonal of Z^T Z


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

    def solve(self, output: torch.Tensor) -> torch.Tensor:
        """The re-fitted projection (D, H·d), fp64. Raises FloatingPointError when the activations
        are not finite.
        """
        gram, start = self.gram.sum, output.detach().double()
        damping = DAMPING * gram.diagonal().mean()
        if not torch.isfinite(gram).all() or not torch.isfinite(self.cross.sum).all():
            raise FloatingPointError("the calibration activations contain NaN or infinity")
        if damping == 0:  # z is 0 on all tokens: any projection is as good
            return start
        system = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(system)
        return torch.cholesky_solve(self.cross.sum + damping * start.T, factor).T
