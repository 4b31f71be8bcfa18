"""Position interpolation (PI, arXiv:2306.15595; kaiokendev's linear scaling)."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.positions.base import Scaled, register


@register("pi")
@dataclass(frozen=True)
class Interpolation(Scaled):
    """PI (arXiv:2306.15595): positions are divided by the factor: theta_i / s. Made for
    fine-tuning; without it, quality drops.
    """

    def frequencies(self, trained, length=None):
        return trained.thetas() / self.scale(trained), 1.0

    def parameters(self, trained):
        return {"rope_type": "linear", "rope_theta": trained.base, "factor": self.scale(trained)}
