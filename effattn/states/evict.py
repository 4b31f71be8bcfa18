"""Caches of which each head keeps tokens of its own, as a kind: "evict(policy='snapkv', keep=0.5)"
in `swap(cache=...)`. What is kept when, `effattn.states.evicting` says.

    keep       a share of the tokens, or how many of them, for each K/V head; sinks and recent too
    policy     which of the others: a name in `effattn.states.policies`, with its options
    format     "int8" or "int4": the older tokens are packed, each by itself"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from effattn.errors import check_choice
from effattn.kernels.latent.packed import width
from effattn.kernels.pack import Coding
from effattn.specs import parse_spec
from effattn.states.base import State
from effattn.states.caches import Heads, Holder, LayerCache, full_bytes, register
from effattn.states.evicting import EvictingState, Rule
from effattn.states.full import FullState
from effattn.states.policies import Policy
from effattn.states.policies import parse as parse_policy

GROUPS = {"int8": 128, "int4": 32}  # numbers of a token that share a scale, at most


@register
@dataclass(frozen=True)
class Evict(LayerCache):
    """Tokens that a policy chooses, by head. codings, rotary: of a layer, once it is fitted."""

    spec: str
    policy: Policy
    keep: int | float = 0.5
    sinks: int = 4
    recent: int = 64
    every: int | None = 256
    adaptive: bool = False
    floor: float = 0.2
    format: str | None = None
    said: str = ""
    codings: tuple[Coding | None, Coding | None] = (None, None)
    rotary: Any = field(default=None, compare=False, repr=False)

    name = "evict"
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "policy",
        "keep",
        "sinks",
        "recent",
        "every",
        "adaptive",
        "floor",
        "format",
    )

    @classmethod
    def parse(cls, spec: str) -> Evict:
        _, options = parse_spec(spec)
        for option in options:
            check_choice("cache: evict: option", option, cls.OPTIONS)
        policy = options.pop("policy", "snapkv")
        if not isinstance(policy, str):
            raise ValueError(f"cache {spec!r}: policy: got {policy!r}, valid is a name in quotes")
        try:
            one = cls(spec, parse_policy(policy), **options)
        except ValueError as error:
            raise ValueError(f"cache {spec!r}: {error}") from error
        one.check()
        return one

    def check(self) -> None:
        """ValueError for options that mean nothing."""

        def refuse(option: str, valid: str) -> None:
            got = getattr(self, option)
            raise ValueError(f"cache {self.spec!r}: {option}: got {got!r}, valid is {valid}")

        for option in ("sinks", "recent"):
            if type(getattr(self, option)) is not int or getattr(self, option) < 0:
                refuse(option, "a whole number of at least 0")
        least = self.sinks + self.recent + 1
        if type(self.keep) is int:
            if self.keep < least:
                valid = "a share above 0 and below 1, or a whole number of tokens"
                refuse("keep", f"{valid}, at least {least}: sinks, recent and one more")
        elif type(self.keep) is not float or not (math.isfinite(self.keep) and 0 < self.keep < 1):
            refuse("keep", "a share above 0 and below 1, or a whole number of tokens")
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            refuse("every", "None, or a whole number of at least 1")
        if type(self.adaptive) is not bool:
            refuse("adaptive", "True or False")
        if type(self.floor) not in (int, float) or not 0 <= self.floor <= 1:
            refuse("floor", "a share of 0 to 1")
        if self.format is not None:
            check_choice(f"cache {self.spec!r}: format", self.format, GROUPS)

    def fit(self, heads: Heads) -> Evict:
        codings = (None, None)
        if self.format is not None:
            codings = (self._coding(heads.head_dim), self._coding(heads.value_dim))
        reads = self.policy.rotation or self.policy.asks
        rotary = getattr(heads, "rotary", None) if reads else None
        return replace(self, codings=codings, rotary=rotary)

    def _coding(self, dim: int) -> Coding:
        """Of a token's key or value of `dim` numbers. ValueError where they fill no bytes."""
        assert self.format is not None
        coding = Coding(self.format, "token", 1, symmetric=self.format == "int8")
        if dim % coding.planes:
            raise ValueError(
                f"cache {self.spec!r}: format: {self.format} packs {coding.planes} numbers into a "
                f"byte; got heads of {dim}"
            )
        most = GROUPS[self.format]
        return replace(coding, group=max(g for g in coding.groups(dim) if g <= most))

    def refuses(self, backend: Holder, *, rotary: bool, device: torch.device) -> str | None:
        if not (backend.packable and type(backend.new_state()) is FullState):
            return (
                f"cache {self.spec!r} lets go of tokens that its policy chooses, and "
                f"{backend.name} says itself who sees whom; it goes with dense"
            )
        return None

    def refuses_rule(self, rule: str) -> str | None:
        if self.policy.rotation:
            return (
                f"cache {self.spec!r}: its policy reads the model's own rotation, and positions "
                f"are {rule}; valid are other policies"
            )
        return None

    def hold(self, own: State, backend: Holder) -> EvictingState:
        given = {one.name: getattr(self, one.name) for one in fields(Rule)}
        rotary = self.rotary
        # a function, which copies of a state share
        return EvictingState(Rule(**given), None if rotary is None else lambda: rotary.rope())

    def bytes_per_token(self, heads: Heads) -> int | float:
        """Of one more token, of which a share is kept; of a number of tokens, of one of them."""
        whole, numbers = full_bytes(heads), heads.kv_heads * (heads.head_dim + heads.value_dim)
        itemsize = whole // numbers
        token = heads.kv_heads * sum(
            dim * itemsize if coding is None else width(coding, dim)
            for dim, coding in zip((heads.head_dim, heads.value_dim), self.codings, strict=True)
        )
        exact = token if type(self.keep) is int else token * self.keep
        return int(exact) if exact == int(exact) else exact

    @property
    def asks(self) -> bool:
        """Whether the policy does."""
        return self.policy.asks

    @property
    def bounded(self) -> bool:
        """Whether the number of tokens that it holds is."""
        return type(self.keep) is int and self.every is not None
