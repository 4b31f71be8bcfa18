"""The bases of Giraffe (arXiv:2308.10882): `power` and `truncated`. Both need fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effattn.positions.base import Rotation, check_count, check_number, register


@register("power")
@dataclass(frozen=True)
class Power(Rotation):
    """Giraffe's power scaling (arXiv:2308.10882): theta_i (1 - 2i/R)^kappa. Low frequencies fall
    towards 0, high ones hardly change. Needs fine-tuning."""

    kappa: float

    def __post_init__(self):
        check_number("power", "kappa", self.kappa)

    def frequencies(self, trained, length=None):
        left = 1 - torch.arange(0, trained.dims, 2, dtype=torch.float64) / trained.dims
        return (trained.thetas().double() * left**self.kappa).float(), 1.0


@register("truncated")
@dataclass(frozen=True)
class Truncated(Rotation):
    """Giraffe's truncated basis (arXiv:2308.10882): with t = 2 pi / length: frequencies of at least
    t stay, those below t become t/16, those below t/8 become 0.

    length: the wavelength in tokens from which on frequencies are cut; the trained length if not
    given."""

    length: int | None = None

    def __post_init__(self):
        if self.length is not None:
            check_count("truncated", "length", self.length)

    def frequencies(self, trained, length=None):
        # frequencies that turn once or more within the length have been seen whole; of the others
        # some turn slowly, and the slowest not at all
        thetas, t = trained.thetas(), 2 * math.pi / (self.length or trained.length)
        return torch.where(thetas < t / 8, 0.0, torch.where(thetas < t, t / 16, thetas)), 1.0
