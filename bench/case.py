"""The words that rows are written in: a case, its contenders, and the targets held against what was
measured.

The engine (`measure`, `run`) knows no method: a `Case` makes inputs and says what a call's answers
are, a `Contender` builds a call and brings the truth that its answers are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from effattn.interface import Cost

Call = Callable[..., object]
# RMS(error) / RMS(truth) that an answer may have; a gradient, which rounds more often, twice that.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.005, "float16": 0.005}


class Absent(Exception):
    """This contender cannot run here; the text says why."""


@dataclass(frozen=True)
class Defined:
    """A call that no formula of ours describes, as with parameters that a peer draws for itself.
    definition: its own method's formula, slow and obvious, for inputs of fp64."""

    run: Call
    definition: Call

    def __call__(self, *inputs: Tensor) -> object:
        return self.run(*inputs)


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    build(case, inputs) returns the call that is timed as call(*inputs), or raises `Absent`.
    truth(case, inputs, call) gives what `Case.answers` must give for that call, in fp64; None:
    nothing to check. `tolerance`: instead of `TOLERANCE`. `tokens` overrides the case's length.
    `check_tokens`: the answers are checked at this length, for truths that are too slow for the
    timed one. For the plan: `setup`, seconds that building takes (a compiler), and `efficiency`,
    which share of the device's peak it may reach."""

    name: str
    build: Callable[[Case, list[Tensor]], Call]
    truth: Callable[[Case, list[Tensor], Call], dict[str, Tensor]] | None = None
    ours: bool = False
    spec: str = ""
    tokens: int | None = None
    check_tokens: int | None = None
    tolerance: float | None = None
    setup: float = 0.0
    efficiency: float = 0.4


@dataclass(frozen=True)
class Case:
    """One race. A subclass writes `inputs`, and where it applies `once`, `answers` and `cost`.

    what: "forward", "forward+backward", "decode", …; a title tells cases of the same shape apart.
    Cases of one `group` make one plot over `tokens`. remark: what a reader of the numbers has to
    know. declared: for a case whose contenders differ in length only, the exponents of time and of
    memory in the length that are promised."""

    what: str
    dtype: str
    tokens: int
    contenders: tuple[Contender, ...]
    title: str = ""
    remark: str = ""
    declared: tuple[float, float] | None = None

    @property
    def shape(self) -> str:
        """The sizes, as the name has them."""
        return f"T{self.tokens}"

    @property
    def name(self) -> str:
        """What identifies a case in the results."""
        return " ".join(filter(None, (self.what, self.title, self.dtype, self.shape)))

    @property
    def group(self) -> str:
        """What cases of one table have in common."""
        return " ".join(filter(None, (self.what, self.title, self.dtype)))

    def length(self, contender: Contender) -> int:
        """Tokens that a contender is timed at."""
        return contender.tokens or self.tokens

    def described(self) -> dict:
        """Its settings, JSON-able."""
        found = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name != "contenders"
        }
        declared = self.declared and {"time": self.declared[0], "memory": self.declared[1]}
        return {**found, "declared": declared, "group": self.group}

    def inputs(self, tokens: int, device: torch.device, seed: int = 0) -> list[Tensor]:
        """What a call gets, at a length of `tokens`."""
        raise NotImplementedError

    def sets(self, device: torch.device) -> int:
        """How many inputs take turns, so that none is found in a processor's cache."""
        return 1

    def once(self, call: Call, inputs: list[Tensor]) -> object:
        """What is timed."""
        with torch.no_grad():
            return call(*inputs)

    def answers(self, call: Call, inputs: list[Tensor]) -> dict[str, Tensor]:
        """What of a call is compared with the truth. Names that begin with d are gradients."""
        return {"output": self.once(call, inputs)}

    def cost(self, contender: Contender) -> Cost | None:
        """The fewest operations and bytes of one timed call; None where that is not known."""
        return None


@dataclass(frozen=True)
class Ratio:
    """How many times `of` is what `over` is: medians of milliseconds, or another entry. Both are
    (case, contender).
    """

    of: tuple[str, str]
    over: tuple[str, str]
    entry: str = "ms_p50"

    def __call__(self, results: Mapping) -> float | None:
        high, low = (entry_of(results, *which, self.entry) for which in (self.of, self.over))
        return high / low if high and low else None


@dataclass(frozen=True)
class Entry:
    """One number of a contender, as it stands, or over a constant."""

    of: tuple[str, str]
    entry: str
    over: float = 1.0

    def __call__(self, results: Mapping) -> float | None:
        value = entry_of(results, *self.of, self.entry)
        return None if value is None else value / self.over


def entry_of(results: Mapping, case: str, contender: str, entry: str) -> float | None:
    """One number of a contender in the results; None where there is none."""
    return results["cases"].get(case, {}).get("contenders", {}).get(contender, {}).get(entry)


@dataclass(frozen=True)
class Target:
    """A number to reach: `value(results)` is at least `least`, or at most `most`. source: where the
    number comes from. headline: a part of the sentence on top of the report; `{value}` in it is
    what was reached."""

    text: str
    value: Callable[[Mapping], float | None]
    source: str
    least: float | None = None
    most: float | None = None
    unit: str = "x"
    headline: str = ""

    def judge(self, results: Mapping) -> dict:
        """{"what", "value", "target", "unit", "source", "passes"}: value and passes are None where
        not measured.
        """
        value = self.value(results)
        limit, sign = (self.least, ">=") if self.least is not None else (self.most, "<=")
        passes = None if value is None else value >= limit if sign == ">=" else value <= limit
        said = (
            self.headline.format(value=f"{value:.3g}")
            if self.headline and value is not None
            else ""
        )
        return {
            "what": self.text,
            "value": value,
            "target": f"{sign} {limit:g}",
            "unit": self.unit,
            "source": self.source,
            "passes": passes,
            "headline": said,
        }
