"""What decides which tokens a head keeps: the policies of `cache="evict(policy=...)"`.

    policy = parse("snapkv(window=32)")
    scores = policy.score(seen)              # (B, H, M): the highest stay

A policy is one file of this folder: a frozen dataclass under `Policy` with `@register("NAME")`,
whose fields are its options."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from effattn.errors import check_choice
from effattn.specs import parse_spec

__all__ = ["Policy", "Seen", "Turns", "parse", "policies", "register"]


class Turns(Protocol):
    """A rotation of queries and keys, such as `effattn.positions.Rope`."""

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D) turned by so many positions (T,), in its shape and dtype."""
        ...


@dataclass(frozen=True)
class Seen:
    """What a policy may read. B: rows; Hq, H: query and key/value heads; M: tokens that are held,
    the last of them the newest; W: the newest queries.

    q (B, Hq, W, D), k (B, H, M, D), v (B, H, M, Dv), as attention reads them. real (B, H, M) bool:
    which of the places hold a token. scale: of scores. rope: how q and k were turned; None: not at
    all, as far as is known. context: of a live model, what its attention module was called with."""

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor
    scale: float
    rope: Turns | None = None
    context: Any = None


class Policy:
    """Base class. `rotation`: whether it reads how a model turns its queries (`Seen.rope`); `asks`:
    whether it reads `Seen.context`."""

    name: ClassVar[str]
    rotation: ClassVar[bool] = False
    asks: ClassVar[bool] = False

    @property
    def queries(self) -> int:
        """How many of the newest queries it reads when tokens go while decoding; after a prompt it
        gets all of the call's."""
        return 0

    def score(self, seen: Seen) -> Tensor:
        """(B, H, M) float32 or better: of each head, the tokens with the highest stay."""
        raise NotImplementedError


Kind = TypeVar("Kind", bound=type[Policy])
_POLICIES: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: makes a policy known."""

    def add(kind: Kind) -> Kind:
        kind.name = name
        _POLICIES[name] = kind
        return kind

    return add


def policies() -> dict[str, type[Policy]]:
    """name -> class, of every policy."""
    for file in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{file.name}")
    return dict(_POLICIES)


def parse(spec: str) -> Policy:
    """The policy of a spec. ValueError for names and options that there are not, with the nearest
    valid one, and for values other than whole numbers of at least 1."""
    name, options = parse_spec(spec)
    known = policies()
    check_choice("policy", name, known)
    valid = [field.name for field in fields(known[name])]  # type: ignore[arg-type]
    for option, value in options.items():
        check_choice(f"policy: {name}: option", option, valid)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"policy: {name}: {option}: got {value!r}, valid is a whole number of at least 1"
            )
    return known[name](**options)
