"""Rules whose factor is how far the sequence has come: s = max(1, L / T) ("dynamic scaling", YaRN's
paper, arXiv:2309.00071, section 3.4; "dynamic PI" in its figure 5).

Up to the trained length T nothing changes at all; beyond it a sequence of L tokens is squeezed by
just what it needs. The length so far decides for all keys: they are kept raw and turned when they
are read, so that none is stale, and a step at length L is what a fresh prefill of those L tokens
gives its newest token. A row's length counts from its first real token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.positions.base import Rotation, check_number, register
from effattn.positions.yarn import kept_by_index, mixed, temperature


class _Dynamic(Rotation):
    """No factor is given: the length of the sequence is one."""

    stretches = True
    varies = True

    def stretched(self, trained, length: int | Tensor | None) -> float | Tensor:
        """s = max(1, L / T), or of every row, (B,) float32."""
        if isinstance(length, Tensor):
            return (length.double() / trained.length).clamp(min=1).float()
        return 1.0 if length is None else max(1.0, length / trained.length)


@register("dynamic_pi")
@dataclass(frozen=True)
class DynamicPi(_Dynamic):
    """Dynamic position interpolation: positions are divided by s = max(1, L / T)."""

    def frequencies(self, trained, length=None):
        scale = self.stretched(trained, length)
        if isinstance(scale, Tensor):
            return trained.thetas().to(scale.device) / scale[:, None], 1.0
        return trained.thetas() / scale, 1.0


@register("dynamic_yarn")
@dataclass(frozen=True)
class DynamicYarn(_Dynamic):
    """Dynamic YaRN (arXiv:2309.00071, section 3.4): YaRN, its temperature too, with s = max(1, L /
    T). slow, fast: as in `yarn`."""

    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self):
        check_number("dynamic_yarn", "slow", self.slow, above=True)
        check_number("dynamic_yarn", "fast", self.fast, least=self.slow, above=True)

    def frequencies(self, trained, length=None):
        scale = self.stretched(trained, length)
        keep = kept_by_index(trained, self.fast, self.slow)
        if isinstance(scale, Tensor):
            return mixed(trained, keep, scale[:, None]), 0.1 * torch.log(scale) + 1.0
        return mixed(trained, keep, scale), temperature(scale)
