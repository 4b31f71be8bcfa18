"""Which layer gets which format: the least harm that fits into a number of bytes per token,
exactly.

    front = frontier(choices)  # every plan that no other beats, from the smallest to the best
    plan = best(front, budget=1024)
    plan.specs                 # one a layer
    as_swap(plan.specs)        # {"0": "int8", "1-3": "int4(group=32)"}, for effattn.swap's cache=

Harm adds up: the KL of a plan is taken to be the sum of the KLs of its layers, each measured with
that layer alone quantized. That is a model, true for small KLs; so the plan that is chosen is
measured as a whole, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One format in one layer: what it costs in bytes a token, and the KL in nats that it was
    measured at. Bytes are whole numbers over powers of two, so that their sums are exact."""

    spec: str
    bytes: float
    kl: float


@dataclass(frozen=True)
class Plan:
    """A format for every layer, the bytes a token that they take together, and the sum of their
    KLs.
    """

    specs: tuple[str, ...]
    bytes: float
    kl: float


def frontier(layers: Sequence[Sequence[Choice]]) -> list[Plan]:
    """Every plan that is not beaten, bytes ascending and KL descending; `layers`: the choices of
    each layer.

    Layer after layer, all sums are made and the beaten ones dropped, so that the result is exact
    (multiple-choice knapsack by dominance; Nemhauser and Ullmann 1969). Layers of one shape share
    their few sizes, so that the number of different sums, and with it the work, stays a polynomial
    in the number of layers."""
    plans = [Plan((), 0.0, 0.0)]
    for choices in layers:
        grown = [
            Plan((*plan.specs, choice.spec), plan.bytes + choice.bytes, plan.kl + choice.kl)
            for plan in plans
            for choice in choices
        ]
        plans = []
        for plan in sorted(grown, key=lambda one: (one.bytes, one.kl)):
            if not plans or plan.kl < plans[-1].kl:
                plans.append(plan)
    return plans


def plans(
    sizes: Mapping[str, Sequence[float]], alone: Sequence[Mapping], layers: int
) -> list[Plan]:
    """The frontier of formats. sizes: of each, the bytes a token in each layer. alone: {layer,
    spec, kl} of each in each layer alone; what is not there, as full precision, harms nothing."""
    harm = {(row["layer"], row["spec"]): row["kl"] for row in alone}
    choices = [
        [
            Choice(spec, size[index], max(0.0, harm.get((index, spec), 0.0)))
            for spec, size in sizes.items()
        ]
        for index in range(layers)
    ]
    return frontier(choices)


def check_budget(budget: float, least: float) -> None:
    """ValueError when not even the smallest format in every layer fits; `least` is what that
    takes.
    """
    if budget < least:
        raise ValueError(
            f"budget_bytes_per_token: got {budget:,g}, the least possible with these formats is "
            f"{least:,g} bytes a token; give more, or a format with fewer bits"
        )


def best(front: Sequence[Plan], budget: float) -> Plan:
    """The plan of the least KL that takes at most `budget` bytes a token. ValueError, with the
    least possible.
    """
    check_budget(budget, front[0].bytes)
    return [plan for plan in front if plan.bytes <= budget][-1]


def as_swap(specs: Sequence[str]) -> dict[str, str]:
    """The formats, one a layer, as `effattn.swap(model, cache=...)` takes them: runs of the same
    put together.
    """
    found, start = {}, 0
    for index in range(1, len(specs) + 1):
        if index == len(specs) or specs[index] != specs[start]:
            found[str(start) if index - 1 == start else f"{start}-{index - 1}"] = specs[start]
            start = index
    return found


def as_told(plan: Plan, budget: float) -> dict:
    """The plan as a report has it: {budget, specs, cache, bytes_per_token, kl}."""
    return {
        "budget": budget,
        "specs": list(plan.specs),
        "cache": as_swap(plan.specs),
        "bytes_per_token": plan.bytes,
        "kl": plan.kl,
    }
