"""Log-n scaling (Su 2021, https://kexue.fm/archives/8823): queries grow with the logarithm of how
many keys they see, so that attention does not flatten out as sequences grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.positions.base import Part, Trained, check_count, register


@register("logn")
@dataclass(frozen=True)
class LogN(Part):
    """A query at position n (from 0) is multiplied by max(1, log(n + 1)/log T): the test-time form,
    without effect up to the trained length T. trained=True: by log(n + 1)/log T, for models that
    were trained with it.

    length: T if not the model's trained length. n is the query's position, whatever the pattern
    shows it."""

    trained: bool = False
    length: int | None = None

    slot = "scale"
    causal_only = True

    def __post_init__(self):
        if type(self.trained) is not bool:
            raise ValueError(f"logn: trained: got {self.trained!r}, valid are True and False")
        if self.length is not None:
            check_count("logn", "length", self.length, least=2)

    def factors(self, positions: Tensor, trained: Trained) -> Tensor:
        """What queries at `positions`, int64 (T,) or (B, T), are multiplied by: float64, of the
        same shape."""
        factors = torch.log(positions.double() + 1) / math.log(self.length or trained.length)
        return factors if self.trained else factors.clamp(min=1.0)
