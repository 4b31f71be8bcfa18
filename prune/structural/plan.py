"""What structured pruning is asked for, checked before anything is computed: how many of each
target stay, and what ranks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.errors import Unsupported, check_choice
from effattn.hf import anatomy as hf
from effattn.hf import uneven
from effattn.prune.structural import criteria
from effattn.prune.structural.criteria.base import TARGETS
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.sliced_config import reachable_heads, sliced_config

TOKENS_PER_DIMENSION = 10  # of an output module that is solved again
WHAT = {"heads": "key/value heads a layer", "ffn": "FFN dimensions a layer", "layers": "layers"}

Amount = int | float | None


@dataclass(frozen=True)
class Plan:
    """What is to be done, checked: how many of each target stay (targets that lose nothing are
    absent), how many of each go, and what ranks each."""

    keep: dict[str, int]
    removed: dict[str, int]
    criteria: dict[str, str]
    uniform: bool = True  # whether each layer keeps as many, and not all of them on average

    def most(self, target: str) -> int:
        """How many a layer may keep; 0 for targets that lose nothing."""
        kept = self.keep.get(target, 0)
        return kept if self.uniform else kept + self.removed.get(target, 0)

    @property
    def ranked(self) -> dict[str, list[str]]:
        """Criterion -> the targets that it ranks."""
        found: dict[str, list[str]] = {}
        for target, name in self.criteria.items():
            found.setdefault(name, []).append(target)
        return found

    @property
    def inside(self) -> list[str]:
        """Of what something goes within layers, not with them."""
        return [target for target in ("heads", "ffn") if target in self.keep]


def plan_of(
    parts: hf.Anatomy,
    amounts: Mapping[str, Amount],
    criterion: str | Mapping[str, str],
    uniform: bool = True,
) -> Plan:
    """The plan behind `structured`'s arguments. ValueError and Unsupported, as there, before
    anything is computed.
    """
    if uneven.overrides(parts.config):
        raise Unsupported(
            f"{type(parts.model).__name__}: its layers differ already, which no criterion ranks; "
            "prune the model that they came from, or slice_model(..., uniform=False)"
        )
    sizes = {"heads": parts.kv_heads, "layers": len(parts.layers)}
    if amounts.get("ffn") is not None:
        sizes["ffn"] = parts.layers[0].feed_forward.size
    keep = {}
    for target in TARGETS:
        if amounts.get(target) is not None:
            staying = _staying(target, amounts[target], sizes[target])
            if staying < sizes[target]:
                keep[target] = staying
    if not keep:
        got = ", ".join(str(amounts.get(target)) for target in TARGETS)
        raise ValueError(
            f"heads, ffn, layers: got {got}, which removes nothing; valid is at least one of "
            "them: an int (how many stay) or a float in (0, 1) (the share that is removed)"
        )
    named = dict.fromkeys(keep, criterion) if isinstance(criterion, str) else dict(criterion)
    for target, name in named.items():
        check_choice("criterion", target, TARGETS)
        criteria.check(name, target, parts)
    for target in keep:
        if target not in named:
            raise ValueError(
                f"criterion: got none for {target}, which is to be pruned; valid is a name for "
                "each target"
            )
    if uniform:
        _check_shape(parts, keep)
    else:
        _check_uneven(parts, named)
    removed = {target: sizes[target] - staying for target, staying in keep.items()}
    return Plan(keep, removed, {target: named[target] for target in keep}, uniform)


def _staying(target: str, amount: Amount, size: int) -> int:
    """How many stay. ValueError unless it is an int in [1, size] or a float in (0, 1) that leaves
    at least one.
    """
    valid = (
        f"an int from 1 to {size} (how many stay) or a float between 0 and 1 (the share that "
        "is removed)"
    )
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ValueError(f"{target}: got {amount!r}, valid is {valid}")
    share = isinstance(amount, float)
    staying = round(size * (1 - amount)) if share and 0 < amount < 1 else amount
    if (share and not 0 < amount < 1) or not 1 <= staying <= size:
        raise ValueError(
            f"{target}: got {amount}, the model has {size} {WHAT[target]}; valid is {valid}"
        )
    return int(staying)


def _check_shape(parts: hf.Anatomy, keep: dict[str, int]) -> None:
    """Unsupported where the class's config cannot say this shape: before anything is measured."""
    if "heads" in keep:
        for layer in parts:
            layer.q.by_head, layer.o.by_head  # noqa: B018 - raise where heads are no rows of a weight
        valid = reachable_heads(parts.model.config)
        if keep["heads"] not in valid:
            lower = [n for n in valid if n < parts.kv_heads]
            can = (
                f"it can keep {', '.join(map(str, lower))}"
                if lower
                else "it cannot lose any at this hidden size"
            )
            raise Unsupported(
                f"heads: got {keep['heads']} to keep, {type(parts.model).__name__} (hidden size "
                f"{parts.config.hidden_size}, {parts.kv_heads} key/value heads) {can}"
            )
    staying = keep.get("layers", len(parts.layers))
    first = {
        target: [torch.arange(keep[target])] * staying
        for target in ("heads", "ffn")
        if target in keep
    }
    sliced_config(parts.model.config, Keep(**first, layers=torch.arange(staying)))


def _check_uneven(parts: hf.Anatomy, named: Mapping[str, str]) -> None:
    """ValueError and Unsupported where layers cannot differ."""
    uneven.check(parts.config, {})
    for target, name in named.items():
        if target != "layers" and criteria.find(name).stops:
            raise ValueError(
                f"criterion: got {name!r} for {target} with uniform=False: it ranks what goes "
                "within a layer, not across layers; valid is another, such as 'taylor'"
            )


def check_enough(parts: hf.Anatomy, plan: Plan, tokens: Tensor) -> None:
    """ValueError for less text than output modules are solved again from: with fewer tokens than
    inputs their second moments would be noise."""
    inputs = [
        plan.most("heads") * (parts.heads // parts.kv_heads) * parts.head_dim,
        plan.most("ffn"),
    ]
    needed = TOKENS_PER_DIMENSION * max(inputs)
    if len(tokens) < needed:
        raise ValueError(
            f"tokens: got {len(tokens):,}, at least {needed:,} are needed to solve for output "
            f"modules with {max(inputs):,} inputs; give more text, or compensate=False"
        )
