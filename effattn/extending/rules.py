"""The position rules that `recipes/extend_context.py` sets side by side, for any trained length.

The selection, and the windows and factors in units of the trained length, are those of Su's
articles on ReRoPE (https://kexue.fm/archives/9708, 9731); YaRN, dynamic NTK and the sliding windows
are added."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from effattn.errors import check_choice
from effattn.surgery.swapping import restore, swap

FREQUENCIES, CLIPPED, WINDOW = "frequencies", "clipped", "window"
LOGN = "+ log-n"  # what is added to a name


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

    @contextmanager
    def on(self, model: nn.Module):
        """The model with the rule, and as it was afterwards."""
        if self.axes:
            with warnings.catch_warnings():
                # it is what we show
                warnings.filterwarnings("ignore", message=".*is not below the .* tokens.*")
                swap(model, **self.axes)
        try:
            yield model
        finally:
            restore(model)


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
            for k in (8, 16, 32, 64)
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
