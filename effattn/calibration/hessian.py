"""The Hessian of a linear layer's squared output error, H = mean over tokens of 2 x x^T, and the
factor of its inverse.

One matrix serves every linear layer that sees the same input (q, k and v; gate and up). The factor
is what GPTQ (arXiv:2210.17323, step 3) and SparseGPT (arXiv:2301.00774) read row by
row, so that no inverse is ever updated.

d: inputs of the layer; all matrices (d, d).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.damping import DAMPING

PANEL = 256  # columns of the triangular inverse that are solved for at a time


class Hessian:
    """A running mean of 2 x x^T over all tokens seen, fp32 (fp64 for fp64 inputs); `diagonal_only`:
    of 2 x^2.

    Memory is one matrix (inputs, inputs), or one vector. `mean` is None until something was added.
    """

    def __init__(self, diagonal_only: bool = False):
        self.diagonal_only, self.tokens = diagonal_only, 0
        self.mean: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x (..., inputs): one row a token."""
        x = x.detach().flatten(0, -2)
        x = x if x.dtype == torch.float64 else x.float()
        # a running mean, not a sum: it stays of the size of one token's, and fp32 is enough
        old = self.tokens
        self.tokens += len(x)
        if self.mean is None:
            shape = x.shape[-1:] if self.diagonal_only else (x.shape[-1], x.shape[-1])
            self.mean = x.new_zeros(shape)
        if self.diagonal_only:
            self.mean.mul_(old / self.tokens).add_(x.square().sum(0), alpha=2 / self.tokens)
        else:
            self.mean.addmm_(x.T, x, beta=old / self.tokens, alpha=2 / self.tokens)

    @property
    def diagonal(self) -> Tensor:
        """(inputs,): the mean of 2 x_j^2, once something was added."""
        assert self.mean is not None
        return self.mean if self.diagonal_only else self.mean.diagonal()

    def check(self, name: str) -> None:
        """FloatingPointError, naming the layer, when an activation was NaN or Inf (or its square
        overflows).
        """
        bad = int((~torch.isfinite(self.diagonal)).sum())
        if bad:
            raise FloatingPointError(
                f"activations: the inputs of {name} hold NaN or Inf in {bad} of "
                f"{len(self.diagonal)} features"
            )


@dataclass(frozen=True)
class InverseHessian:
    """`factor`: U, upper triangular (d, d), with U^T U = (H + damping * diag H)^-1. `dead`
    (d,) bool: inputs that were always 0, which count as 1 in H."""

    factor: Tensor
    dead: Tensor
    damping: float

    @classmethod
    def of(
        cls, hessian: Tensor, damping: float, name: str, raise_damping: bool = False
    ) -> InverseHessian:
        """For hessian (d, d), which is left as it is. Raises LinAlgError that names the layer where
        H is not positive definite; with `raise_damping` only when it is not with ten times the
        damping either, and so on up to 1."""
        # An input that is always 0 has a row and a column of zeros, for which there is no inverse.
        # Its weights change nothing; 1 on the diagonal keeps it apart from all others.
        dead = hessian.diagonal() == 0
        if bool(dead.any()):
            hessian = hessian.clone()
            hessian.diagonal().masked_fill_(dead, 1)
        used = damping
        while (factor := inverse_factor(hessian, used)) is None:
            more = max(10 * used, DAMPING)
            if not raise_damping or more > 1:
                tried = f"damping {damping:g}" + (f" to {used:g}" if used != damping else "")
                advice = (
                    "more calibration tokens"
                    if raise_damping
                    else "more damping, or raise_damping=True"
                )
                raise torch.linalg.LinAlgError(
                    f"{name}: the Cholesky factorisation of its Hessian fails with {tried}; give "
                    f"{advice}"
                )
            used = more
        return cls(factor, dead, used)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """U, upper triangular with U^T U = (H + damping * diag H)^-1, damped as by `damped`; None where
    that is not positive definite.

    The textbook way is three factorisations (H, its inverse, that one's upper factor). Here H is
    read backwards: J H J = L L^T for the reversal J gives H^-1 = (J L^-1 J)^T (J L^-1 J), one
    factorisation and one triangular inverse."""
    reverse = hessian.flip(0, 1)
    reverse.diagonal().mul_(1 + damping)
    factor, failed = torch.linalg.cholesky_ex(reverse)
    del reverse  # at most three matrices of this size at once
    diagonal = factor.diagonal()
    if failed or not bool(torch.isfinite(diagonal).all()) or float(diagonal.min()) <= 0:
        return None
    inverse = invert_lower(factor)
    del factor, diagonal
    return inverse.flip(0, 1)


def invert_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by panels of columns: zeros above are never
    computed.
    """
    size = len(lower)
    inverse = torch.zeros_like(lower)
    identity = torch.eye(size, min(PANEL, size), dtype=lower.dtype, device=lower.device)
    for start in range(0, size, PANEL):
        rest, width = size - start, min(PANEL, size - start)
        inverse[start:, start : start + width] = torch.linalg.solve_triangular(
            lower[start:, start:], identity[:rest, :width], upper=False
        )
    return inverse
