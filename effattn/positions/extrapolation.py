"""What the base of a rotation promises: the critical dimension and the scaling law of RoPE
extrapolation (arXiv:2310.05209).

Of a head's R dimensions, those whose period lies within the trained length T have seen every angle;
the others have not, and what they say beyond T is extrapolation. Lengths and wavelengths are in
tokens."""

from __future__ import annotations

import math


def wavelengths(base: float, dims: int) -> list[float]:
    """2 pi b^(2i/R), the period of each of the R/2 frequencies."""
    return [2 * math.pi * base ** (2 * i / dims) for i in range(dims // 2)]


def critical_dimension(base: float, dims: int, length: int) -> int:
    """d_extra = 2 ceil((R/2) log_b(T / 2 pi)), at most R: the dimensions that turned once or more
    while training.
    """
    return max(0, min(dims, 2 * math.ceil(dims / 2 * math.log(length / (2 * math.pi), base))))


def critical_base(base: float, length: int, tuned: int) -> float:
    """beta_0 = b^(log_{T/2pi}(T_tune/2pi)): the base above which tuning at `tuned` tokens a model
    trained at `length` with `base` extrapolates by the law of `extrapolation_limit`. Solves
    d_extra(b, T) = d_extra(beta_0, T_tune)."""
    return base ** (math.log(tuned / (2 * math.pi)) / math.log(length / (2 * math.pi)))


def extrapolation_limit(base: float, dims: int, length: int, new_base: float, tuned: int) -> float:
    """How long a model trained at `length` with `base` holds after tuning at `tuned` tokens with
    `new_base`: theorem 3, 2 pi beta^(d_extra/R) for a base above `critical_base`, `tuned`
    otherwise."""
    if new_base <= critical_base(base, length, tuned):
        return float(tuned)
    return 2 * math.pi * new_base ** (critical_dimension(base, dims, length) / dims)
