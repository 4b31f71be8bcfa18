"""NTK-aware scaling: high frequencies stay, low ones are interpolated, by one smooth rule.

Three variants and their names are Su's (https://kexue.fm/archives/9706): with a = ln s / (d/2)^p
and m = 1 .. d/2, theta_m = b^(-2(m-1)/d) exp(-a m^p). `fixed` is p = 1, `mixed` p = 0.625 (or
another), `old` is bloc97's change of base, b s^(d/(d-2)). `dynamic_ntk` lets the length of the
sequence decide the base (emozilla)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effattn.errors import Unsupported, check_choice
from effattn.positions.base import Rotation, Scaled, check_number, register

VARIANTS = ("old", "fixed", "mixed")


@register("ntk")
@dataclass(frozen=True)
class Ntk(Scaled):
    """NTK-aware scaling (https://kexue.fm/archives/9706): theta_0 hardly changes and the last theta
    is divided by the factor. power: p of the mixed variant.
    """

    variant: str = "old"
    power: float = 0.625

    def __post_init__(self):
        super().__post_init__()
        check_choice("ntk: variant", self.variant, VARIANTS)
        check_number("ntk", "power", self.power, above=True)

    def check(self, trained):
        super().check(trained)
        _check_pairs("ntk", trained)

    def frequencies(self, trained, length=None):
        scale = self.scale(trained)
        if self.variant == "old":
            return trained.thetas(_base(trained, scale)), 1.0
        pairs, power = trained.dims // 2, 1.0 if self.variant == "fixed" else self.power
        # such that the last frequency, m = d/2, is divided by s exactly
        a = math.log(scale) / pairs**power
        m = torch.arange(1, pairs + 1, dtype=torch.float64)
        return (trained.thetas().double() * torch.exp(-a * m**power)).float(), 1.0

    def parameters(self, trained):
        # a change of base is all that "old" is; the others scale each frequency by itself
        if self.variant != "old":
            return None
        return {"rope_type": "default", "rope_theta": _base(trained, self.scale(trained))}


@register("dynamic_ntk")
@dataclass(frozen=True)
class DynamicNtk(Rotation):
    """Dynamic NTK (emozilla): the base of a sequence of L tokens is b (s L/T - (s - 1))^(d/(d-2)),
    and b up to the trained length T.

    The length so far decides, for all keys: they are kept raw and turned when they are read. So a
    step at length L is what a fresh prefill of those L tokens gives its newest token, from the same
    hidden states. A row's length counts from its first real token."""

    factor: float
    varies = True

    def __post_init__(self):
        check_number("dynamic_ntk", "factor", self.factor, least=1)

    def check(self, trained):
        super().check(trained)
        _check_pairs("dynamic_ntk", trained)

    def frequencies(self, trained, length=None):
        if length is None:
            return trained.thetas(), 1.0
        # up to T the factor below is 1, so that nothing changes there
        rows = isinstance(length, torch.Tensor)
        past = length.clamp(min=trained.length).double() if rows else max(length, trained.length)
        return trained.thetas(
            _base(trained, self.factor * past / trained.length - (self.factor - 1))
        ), 1.0

    def parameters(self, trained):
        return {"rope_type": "dynamic", "rope_theta": trained.base, "factor": float(self.factor)}


def _check_pairs(rule, trained):
    if trained.dims < 4:
        raise Unsupported(
            f"positions: {rule!r} needs two frequencies or more, {trained.dims} dimensions turn"
        )


def _base(trained, scale):
    """b s^(d/(d-2)): theta_0 unchanged, the last theta divided by s exactly."""
    dims = trained.dims
    return trained.base * scale ** (dims / (dims - 2))
