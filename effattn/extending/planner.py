"""What every position rule promises a model that is to read longer sequences, before anything is
run or changed.

    plan = make_plan(model, 32768)
    plan.recommended.spec, plan.reason

All of it follows from the rotation (its base and dimensions), the trained length and the target.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass

from torch import nn

from effattn.errors import Unsupported
from effattn.hf import anatomy, positions
from effattn.positions.base import Trained
from effattn.positions.extrapolation import (
    critical_base,
    critical_dimension,
    extrapolation_limit,
    wavelengths,
)
from effattn.positions.registry import parse
from effattn.positions.yarn import temperature

NO, HELPS, NEEDED = "not needed", "helps", "needed"  # tuning


@dataclass(frozen=True)
class Candidate:
    """One rule. tuning: NO, HELPS or NEEDED. plain: transformers computes the same from the config
    alone. predicts: what the formulas say of this model. refused: why the model cannot have it, ""
    where it can."""

    name: str
    spec: str
    tuning: str
    predicts: str
    plain: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """trained, target: tokens. dims of a head turn, with theta_i = base^(-2i/dims); the first
    `turned` of them make a whole turn within the trained length (the critical dimension).
    layers: those that a rule goes to, of `depth`; the others keep the model's own positions, within
    a window of their own, or without a rotation. wavelengths: tokens, one for each pair.
    length_law: how far the law of RoPE extrapolation promises to go without a rule. own:
    transformers' name of the model's rule."""

    trained: int
    target: int
    layers: list[int]
    depth: int
    base: float
    dims: int
    own: str
    turned: int
    length_law: float
    wavelengths: list[float]
    candidates: list[Candidate]
    recommended: Candidate
    reason: str

    @property
    def factor(self) -> float:
        """Target length over trained length."""
        return self.target / self.trained

    def candidate(self, spec: str) -> Candidate | None:
        """The candidate of that name or spec."""
        return next((one for one in self.candidates if spec in (one.name, one.spec)), None)

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"factor": self.factor}


def make_plan(model: nn.Module, target: int, tuned: bool = False) -> Plan:
    """The plan for reading `target` tokens. tuned: whether there will be fine-tuning, which changes
    what is best.

    Raises Unsupported for models without rotary positions, ValueError for a target that is not
    longer than the trained length."""
    trained = of_model(model)
    if type(target) is not int or target <= trained.length:
        raise ValueError(
            f"to: got {target}, the model was trained at {trained.length:,} tokens; valid is more "
            "than that"
        )
    turned = critical_dimension(trained.base, trained.dims, trained.length)
    parts = anatomy.of(model)
    candidates = [_fitted(parts, one) for one in _candidates(trained, target, turned)]
    recommended, reason = _recommend(candidates, trained, target, tuned)
    return Plan(
        trained.length,
        target,
        positions.reached(parts, parse(f"ntk(length={target})")),
        len(parts.layers),
        trained.base,
        trained.dims,
        trained.kind,
        turned,
        extrapolation_limit(
            trained.base, trained.dims, trained.length, trained.base, trained.length
        ),
        wavelengths(trained.base, trained.dims),
        candidates,
        recommended,
        reason,
    )


def of_model(model: nn.Module) -> Trained:
    """What the model's first turning layer without a window of its own was trained with.
    Unsupported without one.
    """
    parts = anatomy.of(model)
    turning = [layer for layer in parts.layers if layer.rotary_dims]
    if not parts.causal or not turning:
        raise Unsupported(
            f"model: {type(model).__name__} has no rotary positions to extend; valid is a causal "
            "model with them, such as 'embedded'"
        )
    layer = next((one for one in turning if one.window is None), turning[0])
    return positions.make(parts, {str(layer.index): "logn"}).layers[layer.index].rule.trained


def base_for(trained: Trained, target: int, turned: int) -> float:
    """The base with which a model tuned at its own trained length reaches `target` by the law of
    RoPE extrapolation, 2 pi beta^(d_extra/R) >= target; and above the critical base, from which on
    that law holds."""
    needed = (target / (2 * math.pi)) ** (trained.dims / max(turned, 1))
    return float(
        math.ceil(
            max(needed, critical_base(trained.base, trained.length, trained.length) * (1 + 1e-6))
        )
    )


def _candidates(trained: Trained, target: int, turned: int) -> list[Candidate]:
    s, length = target / trained.length, f"length={target}"
    window, k = trained.length * 3 // 8, _leak(trained.length, target)
    base = base_for(trained, target, turned)
    old = trained.base * s ** (trained.dims / (trained.dims - 2)) if trained.dims > 2 else math.inf
    reach = extrapolation_limit(trained.base, trained.dims, trained.length, base, trained.length)
    law = (
        f"base {trained.base:,.0f} -> {base:,.0f}: with the critical dimension {turned} of "
        f"{trained.dims}, tuning at {trained.length:,} tokens then holds to {reach:,.0f}"
    )
    return [
        Candidate(
            "rope",
            "rope",
            NEEDED,
            f"as it is: {trained.dims - turned} of {trained.dims} dimensions meet angles "
            f"beyond {trained.length:,} tokens that they never saw",
        ),
        Candidate(
            "pi",
            f"pi({length})",
            NEEDED,
            f"all angles divided by {s:g}: neighbours are {s:g} times closer than ever trained",
        ),
        Candidate(
            "ntk",
            f"ntk({length})",
            HELPS,
            f"base {trained.base:,.0f} -> {old:,.0f}: the fastest angle stays, "
            f"the slowest is divided by {s:g}; in practice it holds to a part of the target "
            "without tuning",
        ),
        Candidate(
            "ntk-mixed",
            f"ntk({length}, variant='mixed')",
            HELPS,
            "as ntk, with the division spread so that theta_m falls by exp(-a m^0.625), a = "
            f"{math.log(s) / (trained.dims / 2) ** 0.625:.3f}",
        ),
        Candidate(
            "dynamic_ntk",
            "dynamic_ntk(factor=1.0)",
            NO,
            f"the base grows with the sequence, unchanged up to {trained.length:,} tokens; at the "
            "target as ntk",
        ),
        Candidate(
            "yarn",
            f"yarn({length})",
            HELPS,
            _ramp(trained, f"yarn({length})", s) + f"; scores times {temperature(s) ** 2:.3f}",
        ),
        Candidate(
            "ntk_by_parts",
            f"ntk_by_parts({length})",
            HELPS,
            _ramp(trained, f"ntk_by_parts({length})", s),
        ),
        Candidate("abf", f"abf(base={base:.0f}, {length})", NEEDED, law),
        Candidate(
            "rerope",
            f"rerope(window={window})",
            NO,
            f"no distance above {window:,}, so nothing untrained at any length; far keys lose "
            "their order",
        ),
        Candidate(
            "leaky_rerope",
            f"leaky_rerope(window={trained.length // 4}, k={k})",
            NO,
            f"distances at the target up to {_farthest(trained.length, target, k):,.0f} of "
            f"{trained.length:,}: far keys keep an order",
        ),
    ]


def _leak(length: int, target: int) -> int:
    """The k of Leaky ReRoPE, a power of two, with which the farthest distance is at most half of
    the trained length.
    """
    k = 2
    while _farthest(length, target, k) > length / 2:
        k *= 2
    return k


def _farthest(length: int, target: int, k: float) -> float:
    window = length // 4
    return window + (target - window) / k


def _ramp(trained: Trained, spec: str, s: float) -> str:
    """How many frequencies a ramp keeps, mixes and divides."""
    if trained.kind not in ("default", "dynamic"):
        return ""
    (part,) = parse(spec)
    ratio = trained.thetas() / part.frequencies(trained)[0]  # 1: kept, s: divided
    kept, divided = int((ratio < 1 + 1e-4).sum()), int((ratio > s * (1 - 1e-4)).sum())
    mixed = len(ratio) - kept - divided
    return f"{2 * kept} dimensions kept, {2 * mixed} mixed, {2 * divided} divided by {s:g}"


def _fitted(parts: anatomy.Anatomy, candidate: Candidate) -> Candidate:
    """The candidate with what this model makes of it."""
    if candidate.name == "rope":
        return Candidate(**{**asdict(candidate), "plain": True})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            order = positions.make(parts, candidate.spec)
    except ValueError as error:
        return Candidate(**{**asdict(candidate), "refused": str(error)})
    return Candidate(**{**asdict(candidate), "plain": order.config is not None})


def _recommend(
    candidates: list[Candidate], trained: Trained, target: int, tuned: bool
) -> tuple[Candidate, str]:
    """The rule to take, and why."""
    by_name = {one.name: one for one in candidates if not one.refused}
    if tuned and "yarn" in by_name:
        why = (
            "with fine-tuning, YaRN reaches long lengths after the fewest tokens (arXiv:2309.00071)"
        )
        if by_name["yarn"].plain:
            return by_name["yarn"], why + ", and the checkpoint is plain transformers"
        return by_name["yarn"], why
    if "rerope" in by_name:
        why = "without fine-tuning, only a clipped distance meets nothing that was never trained"
        if trained.kind not in ("default", "dynamic"):
            why += (
                f"; the model's rotation is changed already ({trained.kind}), so no other rule "
                "of angles fits on it"
            )
        why += "; the checkpoint needs effattn.load"
        if "yarn" not in by_name or by_name["yarn"].plain:
            why += " (yarn, and --tune-tokens, give a plain one)"
        return by_name["rerope"], why
    raise Unsupported(
        f"model: no rule takes it to {target:,} tokens: "
        + "; ".join(one.refused for one in candidates if one.refused)
    )
