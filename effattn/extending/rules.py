"""The position rules that `recipes/extend_context.py` sets side by side, for any trained length.

The selection, and the windows and factors in units of the trained length, are those of Su's
articles on ReRoPE (https://kexue.fm/archives/9708, 9731); YaRN, dynamic NTK and the sliding windows
are added. A checkpoint that was trained with log-n keeps it under every rule; one whose layers were
trained with attention of their own (HWFA) is a row by itself."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from effattn.errors import Unsupported, check_choice
from effattn.positions.logn import LogN
from effattn.positions.registry import parse
from effattn.surgery import record
from effattn.surgery.swapping import active, swap, unswapped

FREQUENCIES, CLIPPED, WINDOW = "frequencies", "clipped", "window"
LOGN = "+ log-n"  # what is added to a name
LEAKS = (8, 16, 32, 64)  # k of Leaky ReRoPE, in windows of a quarter and of half the trained length


@dataclass(frozen=True)
class Rule:
    """One row of the table. axes: what `effattn.swap` takes, nothing for the model as it is. kind:
    FREQUENCIES are other angles, CLIPPED are other distances, WINDOW sees the newest tokens only.
    varies: the length decides, so that a shorter sequence is no prefix of a longer one. logn: with
    the test-time factor."""

    name: str
    axes: dict[str, str] = field(default_factory=dict)
    kind: str = FREQUENCIES
    varies: bool = False
    logn: bool = False

    def with_logn(self) -> Rule:
        """The same rule with queries scaled by log n."""
        spec = self.axes.get("positions")
        axes = {**self.axes, "positions": f"{spec}+logn" if spec else "logn"}
        return Rule(f"{self.name} {LOGN}", axes, self.kind, self.varies, logn=True)

    def beside(self, own: str) -> Rule:
        """The same rule in a model that was trained with the positions `own`, such as log-n; as it
        is, the model has them."""
        if not self.axes:
            return self
        spec = self.axes.get("positions")
        return replace(self, axes={**self.axes, "positions": f"{spec}+{own}" if spec else own})

    @contextmanager
    def on(self, model: nn.Module):
        """The model with the rule, and as it was afterwards."""
        if not self.axes:
            yield model
            return
        with unswapped(model):
            with warnings.catch_warnings():
                # it is what we show
                warnings.filterwarnings("ignore", message=".*is not below the .* tokens.*")
                swap(model, **self.axes)
            yield model


def trained_with(model: nn.Module, name: str) -> dict[str, dict[str, str]]:
    """What a checkpoint called `name` was trained with instead of its class's attention, as `swap`
    takes it: {axis: {layer: spec}}, {} for most. Its trained log-n tells. Unsupported for one that
    was swapped after its training."""
    if active(model) is None:
        return {}
    found = record.of(model)
    specs = found.get("positions", {}).values()
    said = any(isinstance(part, LogN) and part.trained for one in specs for part in parse(one))
    if not said or found.keys() - {"pattern", "positions"}:
        raise Unsupported(
            f"model: {name} is swapped already; valid is a checkpoint with its own attention, or "
            "one that was trained with log-n"
        )
    return _own(model)


def rules(trained: int, longest: int) -> list[Rule]:
    """All of them, for a model trained at `trained` tokens that is to read `longest`; the first is
    the model itself.
    """
    factor = longest / trained
    windows = [eighths * trained // 8 for eighths in (1, 2, 3, 4, 6, 8)]

    def frequencies(name: str, spec: str, varies: bool = False) -> Rule:
        return Rule(name, {"positions": spec}, FREQUENCIES, varies)

    return [
        Rule("baseline"),
        frequencies("pi", f"pi(factor={factor})"),
        *(
            frequencies(f"ntk-{kind}", f"ntk(factor={factor}, variant='{kind}')")
            for kind in ("old", "fixed", "mixed")
        ),
        frequencies("dynamic-ntk", "dynamic_ntk(factor=1.0)", varies=True),
        frequencies("dynamic-pi", "dynamic_pi", varies=True),
        frequencies("dynamic-yarn", "dynamic_yarn", varies=True),
        frequencies("yarn", f"yarn(factor={factor})"),
        *(Rule(f"rerope-{w}", {"positions": f"rerope(window={w})"}, CLIPPED) for w in windows),
        *(
            Rule(
                f"leaky-{k}", {"positions": f"leaky_rerope(window={trained // 4}, k={k})"}, CLIPPED
            )
            for k in LEAKS
        ),
        *(
            Rule(
                f"leaky-{trained // 2}-{k}",
                {"positions": f"leaky_rerope(window={trained // 2}, k={k})"},
                CLIPPED,
            )
            for k in LEAKS
        ),
        *(
            Rule(f"sliding-{w}", {"pattern": f"sliding(window={w}, sinks=4)"}, WINDOW)
            for w in (trained // 2, trained)
        ),
    ]


def chosen(all_rules: Sequence[Rule], names: Sequence[str], logn: bool) -> list[Rule]:
    """The rules that `names` name, by their whole names or what comes before the dash ("rerope");
    all without names. The baseline is always there. With `logn` each position rule comes a second
    time, with the factor. ValueError for unknown names."""
    known = [rule.name for rule in all_rules]
    families = [name.partition("-")[0] for name in known]
    for name in names:
        check_choice("rules", name, dict.fromkeys([*known, *families]))
    wanted = [
        rule
        for rule, family in zip(all_rules, families, strict=True)
        if not names or rule.name in names or family in names or rule.name == known[0]
    ]
    return [
        one
        for rule in wanted
        for one in ((rule, rule.with_logn()) if logn and rule.kind != WINDOW else (rule,))
    ]


def of_own(
    all_rules: Sequence[Rule], names: Sequence[str], own: dict[str, dict[str, str]], layers: int
) -> list[Rule]:
    """As `chosen`, for a model of so many layers with what `trained_with` gave: each rule beside
    the log-n that it was trained with. ValueError for rules in a model whose layers differ."""
    specs = own.get("positions", {})
    if "pattern" not in own and len(specs) == layers and len({*specs.values()}) == 1:
        (spec,) = {*specs.values()}
        if [part.name for part in parse(spec)] == ["logn"]:
            return [rule.beside(spec) for rule in chosen(all_rules, names, logn=False)]
    wanted = chosen(all_rules, names, logn=False) if names else all_rules[:1]
    if wanted[1:]:
        has = ", ".join(f"{where}: {spec}" for one in own.values() for where, spec in one.items())
        raise ValueError(
            f"rules: got {wanted[1].name!r}, and the model was trained with attention of its own "
            f"in its layers ({has}), which no rule goes beside; valid is {all_rules[0].name!r}"
        )
    return list(wanted)


def _own(model: nn.Module) -> dict[str, dict[str, str]]:
    """The patterns and positions that a model has beside its class's."""
    found = record.of(model)
    return {axis: found[axis] for axis in ("pattern", "positions") if axis in found}
