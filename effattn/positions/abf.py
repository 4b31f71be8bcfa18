"""Adjusted base frequency (ABF, arXiv:2309.16039; Code Llama, arXiv:2308.12950): another base, and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from effattn.positions.base import Rotation, check_count, check_number, register


@register("abf")
@dataclass(frozen=True)
class AdjustedBase(Rotation):
    """ABF (arXiv:2309.16039): theta_i = base^(-2i/R). length: the tokens that it is made for, if
    that is to be written down.
    """

    base: float
    length: int | None = None

    stretches = True

    def __post_init__(self):
        check_number("abf", "base", self.base, least=1.0, above=True)
        if self.length is not None:
            check_count("abf", "length", self.length)

    def check(self, trained):
        super().check(trained)
        if self.length is not None and self.length < trained.length:
            raise ValueError(
                f"abf: length: got {self.length}, shorter than the {trained.length} tokens that "
                f"the model was trained with; valid is at least {trained.length}"
            )

    def frequencies(self, trained, length=None):
        return trained.thetas(float(self.base)), 1.0

    def parameters(self, trained):
        return {"rope_type": "default", "rope_theta": float(self.base)}

    def reach(self, trained):
        return self.length or trained.length
