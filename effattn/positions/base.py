"""What position rules are made of: parts by name, and the trained model that they start from.

A part is a small frozen dataclass; its fields are its options. It belongs to one of four slots, and
a rule, such as "yarn(factor=8)+rerope(window=256)+logn", has at most one part in each:

    slot        what it decides                                   parts "rotation"  the angles that
    queries and keys turn by          rope, pi, ntk, yarn, xpos, nope, ... "far"       what pairs
    beyond a window see of each other      rerope, leaky_rerope "scale"     a number that every
    query is multiplied by        logn "bias"      what is added to a pair's score, by its distance
    alibi, kerple, sandwich, t5

T: the trained length in tokens; R: the dimensions of a head that turn; theta_i: the angle of pair i
a token, i = 0 .. R/2 - 1; s: how many times longer than T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from effattn.axes import Axis
from effattn.errors import Unsupported
from effattn.kernels.flash.rules import Bias
from effattn.specs import format_spec

SLOTS = ("rotation", "far", "scale", "bias")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a model was trained with, of one layer: where every rule starts.

    length: tokens T that it was trained at. dims: the R dimensions of a head that turn, 0 without
    rotary positions. base: b in theta_i = b^(-2i/R). inv_freq (R/2,) and scaling: the rotation as
    it is (None: the base's, unscaled), by transformers' rule `kind`. interleaved: pairs are (2i, 2i
    + 1) instead of (i, i + R/2)."""

    length: int
    heads: int
    head_dim: int
    dims: int
    base: float = 10000.0
    interleaved: bool = False
    kind: str = "default"
    inv_freq: Tensor | None = field(default=None, repr=False)
    scaling: float = 1.0

    def thetas(self, base: float | Tensor | None = None) -> Tensor:
        """b^(-2i/R), (R/2,) float32, in transformers' own operations: the same bits. base: another
        one, or one a row (B,), for (B, R/2)."""
        # int64, then float: the order of operations decides the last bit
        exponents = torch.arange(0, self.dims, 2, dtype=torch.int64).to(torch.float) / self.dims
        base = self.base if base is None else base
        if isinstance(base, Tensor):
            return (1.0 / base.double()[:, None] ** exponents.to(base.device)).float()
        return 1.0 / (base**exponents)


class Part:
    """Base class of the parts. `slot`: where it belongs; subclasses check their options in
    `__post_init__`.
    """

    name: ClassVar[str]  # set by `register`
    slot: ClassVar[str]
    causal_only: ClassVar[bool] = False
    # It is made for sequences beyond the trained length. Layers whose own window lets no distance
    # grow that far are better off without it: yarn(factor=4) costs Gemma 3 270M .102 nats a token
    # in all layers, .018 in those with full attention.
    stretches: ClassVar[bool] = False

    @property
    def options(self) -> dict:
        """The options that are not at their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }

    def check(self, trained: Trained) -> None:
        """Whether the part can serve this model. Raises ValueError or Unsupported; warns of what
        will not work.
        """


class Rotation(Part):
    """A part that says by which angles queries and keys turn."""

    slot = "rotation"
    turns: ClassVar[bool] = True  # queries and keys, at all
    # with the length of the sequence, so that cached keys must be raw
    varies: ClassVar[bool] = False
    from_plain: ClassVar[bool] = True  # it changes the plain rotation, not whatever the model has
    by_distance: ClassVar[bool] = True  # what a pair sees of each other is a turn by its distance

    def check(self, trained):
        # rules on top of another rule (YaRN on a Llama 3.1) would mean nothing that a paper says
        if self.turns and not trained.dims:
            raise Unsupported(f"positions: {self.name!r} turns queries and keys, {NO_ROTARY}")
        if self.turns and self.from_plain and trained.kind not in PLAIN_KINDS:
            raise Unsupported(
                f"positions: {self.name!r} changes a model's plain rotation, and this model's is "
                f"changed already, by {trained.kind!r}; valid on top of it are rerope, "
                f"leaky_rerope and logn, or {self.name!r} on the checkpoint that it was made from"
            )

    def frequencies(
        self, trained: Trained, length: int | Tensor | None = None
    ) -> tuple[Tensor, float | Tensor]:
        """(inv_freq (R/2,) float32, what cos and sin are multiplied by). length: tokens of the
        sequence, or of every row (B,), for (B, R/2) and a number or (B,), where the rule varies
        with it; None: up to the trained length."""
        raise NotImplementedError

    def parameters(self, trained: Trained) -> dict | None:
        """transformers' `rope_parameters` for the same rule; None where it has none."""
        return None

    def reach(self, trained: Trained) -> int:
        """The length that the rule is made for, in tokens."""
        return trained.length


@dataclass(frozen=True)
class Scaled(Rotation):
    """A rotation made for a sequence `factor` times longer than the trained one, or for `length`
    tokens.
    """

    factor: float | None = None
    length: int | None = None

    stretches = True

    def __post_init__(self):
        if (self.factor is None) == (self.length is None):
            given = "neither" if self.factor is None else "both"
            raise ValueError(
                f"{self.name}: got {given} of factor and length, valid is one, such as factor=8.0"
            )
        if self.factor is not None:
            check_number(self.name, "factor", self.factor, least=1)
        if self.length is not None:
            check_count(self.name, "length", self.length)

    def check(self, trained):
        super().check(trained)
        if self.length is not None and self.length < trained.length:
            raise ValueError(
                f"{self.name}: length: got {self.length}, shorter than the {trained.length} "
                f"tokens that the model was trained with; valid is at least {trained.length}"
            )

    def scale(self, trained: Trained) -> float:
        """How many times longer than the trained length."""
        return float(self.factor) if self.length is None else self.length / trained.length

    def reach(self, trained):
        return round(self.scale(trained) * trained.length)


class Added(Part):
    """A part that adds to the scores. It takes the rotation's place, unless a rotation is named
    beside it.
    """

    slot = "bias"

    def new_parameters(self, trained: Trained) -> Tensor | None:
        """The numbers that are learned, float32, at their start; None where nothing is."""
        return None

    def bias(self, trained: Trained, tokens: int, learned: Tensor | None) -> Bias:
        """As the kernels take it, for sequences of up to `tokens`."""
        raise NotImplementedError


RULES: Axis[Part] = Axis("positions", "position rule", "effattn.positions")
register = RULES.register

NO_ROTARY = (
    "and these layers have no rotary positions; valid are alibi, kerple, sandwich, t5 and logn"
)
# transformers' rules that are the plain rotation up to the trained length
PLAIN_KINDS = ("default", "dynamic")


def spec_of(parts: tuple[Part, ...]) -> str:
    """The spec that `effattn.positions.parse` reads back as these parts."""
    return "+".join(format_spec(part.name, part.options) for part in parts)


def check_number(
    rule: str, option: str, value: float, least: float = 0.0, above: bool = False
) -> float:
    """`value` if it is a finite number of at least `least` (or `above` it). ValueError naming the
    option otherwise.
    """
    good = (
        type(value) in (int, float)
        and math.isfinite(value)
        and (value > least if above else value >= least)
    )
    if not good:
        valid = f"above {least}" if above else f"of at least {least}"
        raise ValueError(f"{rule}: {option}: got {value!r}, valid is a number {valid}")
    return value


def check_count(rule: str, option: str, value: int, least: int = 1) -> int:
    """`value` if it is an int of at least `least`. ValueError naming the option otherwise."""
    if type(value) is not int or value < least:
        raise ValueError(
            f"{rule}: {option}: got {value!r}, valid is a whole number of at least {least}"
        )
    return value
