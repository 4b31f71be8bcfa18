"""YaRN (arXiv:2309.00071) and its "NTK by parts": frequencies with a short wavelength stay, those
with a long one are interpolated, those between are mixed; and a temperature.

The paper's ramp runs over r = T theta / (2 pi), the turns that a frequency makes within the trained
length (`ntk_by_parts`). The released code, and transformers, ramp over the dimension's index
between rounded borders (`yarn`): up to 73 % apart in theta. llama3 is the paper's ramp again with
other borders."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.positions.base import Scaled, Trained, check_number, register


@dataclass(frozen=True)
class _Ramp(Scaled):
    """slow, fast: frequencies with fewer than `slow` turns within the trained length are
    interpolated, those with more than `fast` stay."""

    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_number(self.name, "slow", self.slow, above=True)
        check_number(self.name, "fast", self.fast, least=self.slow, above=True)

    def mixed(self, trained: Trained, keep: Tensor) -> Tensor:
        """(1 - keep) theta / s + keep theta."""
        return mixed(trained, keep, self.scale(trained))

    def by_turns(self, trained: Trained) -> Tensor:
        """clip((r - slow) / (fast - slow)), (R/2,): how much of each frequency stays."""
        turns = trained.length * trained.thetas() / (2 * math.pi)
        return ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)


@register("yarn")
@dataclass(frozen=True)
class Yarn(_Ramp):
    """YaRN as transformers has it. cos and sin are multiplied by 0.1 ln s + 1, the paper's
    temperature.
    """

    def frequencies(self, trained, length=None):
        keep = kept_by_index(trained, self.fast, self.slow)
        return self.mixed(trained, keep), temperature(self.scale(trained))

    def parameters(self, trained):
        borders = (
            {}
            if (self.fast, self.slow) == (32.0, 1.0)
            else {"beta_fast": self.fast, "beta_slow": self.slow}
        )
        return _parameters("yarn", self, trained, borders)


@register("ntk_by_parts")
@dataclass(frozen=True)
class NtkByParts(_Ramp):
    """The ramp of YaRN's paper (section 3.2), by default without its temperature, which
    `temperature=True` adds.
    """

    temperature: bool = False

    def frequencies(self, trained, length=None):
        scaling = temperature(self.scale(trained)) if self.temperature else 1.0
        return self.mixed(trained, self.by_turns(trained)), scaling

    def parameters(self, trained):
        # transformers' "llama3" is the same ramp, and has no temperature
        return (
            None
            if self.temperature
            else Llama3(self.factor, self.length, self.fast, self.slow).parameters(trained)
        )


@register("llama3")
@dataclass(frozen=True)
class Llama3(_Ramp):
    """Llama 3.1's scaling, transformers' `llama3`: NTK by parts with borders at 4 turns
    (high_freq_factor) and 1.
    """

    fast: float = 4.0

    def frequencies(self, trained, length=None):
        return self.mixed(trained, self.by_turns(trained)), 1.0

    def parameters(self, trained):
        return _parameters(
            "llama3", self, trained, {"low_freq_factor": self.slow, "high_freq_factor": self.fast}
        )


def kept_by_index(trained: Trained, fast: float, slow: float) -> Tensor:
    """How much of each frequency stays, (R/2,): YaRN's ramp as the released code and transformers
    have it, over the dimension's index."""
    # The index at which a frequency makes so many turns within T: T b^(-2i/R) / (2 pi) = turns,
    # solved for i. Rounded outwards, as in the released code.
    low, high = (
        trained.dims
        * math.log(trained.length / (turns * 2 * math.pi))
        / (2 * math.log(trained.base))
        for turns in (fast, slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), trained.dims - 1)
    # 0 below `low`, where frequencies stay, 1 above `high`, where they are interpolated; both
    # borders may round to one index
    ramp = (torch.arange(trained.dims // 2, dtype=torch.float) - low) / (high - low or 0.001)
    return 1 - ramp.clamp(0, 1)


def mixed(trained: Trained, keep: Tensor, scale: float | Tensor) -> Tensor:
    """(1 - keep) theta / s + keep theta, (R/2,), or (B, R/2) for a scale of every row (B, 1)."""
    thetas = trained.thetas()
    if isinstance(scale, Tensor):
        thetas, keep = thetas.to(scale.device), keep.to(scale.device)
    return thetas / scale * (1 - keep) + thetas * keep


def temperature(scale: float) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln s + 1 (equation 22)."""
    return 0.1 * math.log(scale) + 1.0


def _parameters(rope_type: str, rule: _Ramp, trained: Trained, more: dict) -> dict:
    return {
        "rope_type": rope_type,
        "rope_theta": trained.base,
        "factor": rule.scale(trained),
        "original_max_position_embeddings": trained.length,
    } | more
