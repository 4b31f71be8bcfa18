"""Square roots of the matrices that errors are weighed by."""

from __future__ import annotations

import torch

# Weights below this share of the largest count as zero: that head's queries never look along the
# direction.
FLOOR = 1e-14


def roots(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots and (pseudo-)inverse square roots of symmetric positive matrices (n, r, r)."""
    values, vectors = torch.linalg.eigh(weight)
    keep = values > FLOOR * values.amax().clamp_min(1e-300)
    root = torch.where(keep, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(keep, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    transposed = vectors.transpose(1, 2)
    return (vectors * root[:, None]) @ transposed, (vectors * inverse[:, None]) @ transposed
