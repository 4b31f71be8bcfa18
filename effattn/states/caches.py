"""Which tokens a layer keeps while decoding, and in which bytes: the kinds of `swap(cache=...)`.

    cache = parse("int4(group=64, residual=128)")     # None for "full", the pattern's own state
    cache = cache.fit(layer)                          # for heads of these sizes
    if not cache.refuses(backend, rotary=True, device=device):
        state = cache.new_state(backend)

A kind is one file: a frozen dataclass under `LayerCache` with `@register`, in one of `HOMES`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import ClassVar, Protocol, TypeVar

import torch

from effattn.errors import check_choice
from effattn.kernels.latent.packed import width
from effattn.kernels.pack import Coding
from effattn.specs import parse_spec
from effattn.states.base import State
from effattn.traits import Traits

FULL = "full"
# Packages whose files register kinds, and modules that do; they are read when a cache is asked for.
HOMES = ("effattn.states", "effattn.quant.packed.kind")


class Heads(Protocol):
    """The sizes of a layer's keys and values, such as a live model's layer has them."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of a key."""
        ...

    @property
    def value_dim(self) -> int:
        """Size of a value."""
        ...


def full_bytes(heads: Heads) -> int:
    """Of a token in full precision, keys and values of all heads: in the layer's dtype, or fp32 for
    sizes that come without one."""
    numbers = heads.kv_heads * (heads.head_dim + heads.value_dim)
    return getattr(heads, "kv_bytes_per_token", 4 * numbers)


class Described(Protocol):
    """What both the checks of a call and the kinds of cache read of a backend
    (`effattn.interface.Backend`)."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def traits(self) -> Traits:
        """What it says of itself."""
        ...

    @property
    def signature(self) -> str:
        """Its name and options."""
        ...

    def new_state(self) -> State:
        """An empty state."""
        ...


class Holder(Described, Protocol):
    """What a kind reads of the backend that it holds the past of."""

    @property
    def packable(self) -> bool:
        """Whether it lets a state of packed keys attend by itself."""
        ...


class LayerCache:
    """One layer's cache, in place of its pattern's own state. Equal ones hold the same in the same
    way: kinds are frozen dataclasses.

    name: of its specs, which are `name(option=value)`. spec: as asked for. said: what is different
    about it in this layer, in words. raw_keys: whether it needs keys before their rotation."""

    name: ClassVar[str]
    raw_keys: bool = False
    spec: str
    said: str

    # What a kind writes
    # ---------------------------------------------------------------------------------------------

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of its specs: one, or one for each of its formats."""
        return (cls.name,)

    @classmethod
    def parse(cls, spec: str) -> LayerCache:
        """What a spec with one of its names means. ValueError for its options, with the nearest
        valid one.
        """
        raise NotImplementedError

    def fit(self, heads: Heads) -> LayerCache:
        """The same for heads of these sizes. ValueError where that cannot be."""
        return self

    def refuses(self, backend: Holder, *, rotary: bool, device: torch.device) -> str | None:
        """Why a layer with this backend on this device cannot have it; None when nothing is known
        against it. rotary: whether the model has rotary positions.
        """
        return None

    def refuses_rule(self, rule: str) -> str | None:
        """Why it cannot go with a position rule instead of the model's own; None where it can."""
        return None

    def hold(self, own: State, backend: Holder) -> State:
        """An empty state that remembers what `own` would, the backend's own state."""
        raise NotImplementedError

    def static_state(self, length: int, backend: Holder | None = None) -> State | None:
        """An empty state with room for `length` tokens, whose tensors never change their shapes,
        for a backend that sees everything, or for `backend`; None where there is no such form.
        """
        return None

    def bytes_per_token(self, heads: Heads) -> int | float:
        """Of one more token that is held, keys and values of all heads; exact."""
        raise NotImplementedError

    def refuses_latents(self) -> str | None:
        """Why it cannot hold latents in place of keys and values; None where it can."""
        return f"its keys and values are latents, which cache {self.spec!r} cannot hold"

    def latent_coding(self, rank: int) -> Coding:
        """How latents of `rank` numbers are packed, each token by itself. ValueError for ranks that
        do not fit."""
        raise NotImplementedError

    # What everyone calls
    # ---------------------------------------------------------------------------------------------

    def new_state(self, backend: Holder) -> State:
        """An empty state for `backend`, of the size of its own, which it belongs to."""
        state = self.hold(backend.new_state(), backend)
        state.owner = backend.signature
        return state

    def latent_bytes(self, rank: int) -> int:
        """Of one more token that is held, as a latent of `rank` numbers."""
        return width(self.latent_coding(rank), rank)

    @property
    def asks(self) -> bool:
        """Whether its states are to be told what their attention module is called with."""
        return False

    @property
    def bounded(self) -> bool:
        """Whether the number of tokens that it holds is, of a pattern that would hold all."""
        return False

    def __str__(self) -> str:
        return f"{self.spec} ({self.said})" if self.said else self.spec


Kind = TypeVar("Kind", bound=type[LayerCache])
_KINDS: list[type[LayerCache]] = []


def register(kind: Kind) -> Kind:
    """Class decorator: makes a kind known under its names."""
    _KINDS.append(kind)
    return kind


def kinds() -> dict[str, type[LayerCache]]:
    """name -> kind, of every kind in this version. "full", which is none, is not among them."""
    _read_homes()
    found: dict[str, type[LayerCache]] = {}
    for kind in sorted(_KINDS, key=_place):  # whatever was imported first
        for name in kind.names():
            if name in found or name == FULL:
                raise ValueError(f"cache {name!r} is registered already")
            found[name] = kind
    return found


@functools.cache
def _read_homes() -> None:
    """Imports whatever registers a kind; once, since folders are slow to list."""
    for home in HOMES:
        package = importlib.import_module(home)
        for file in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{home}.{file.name}")


def _place(kind: type[LayerCache]) -> tuple[int, str]:
    """Where a kind stands among others: its home's place in `HOMES`, and its file."""
    file = kind.__module__
    homes = [place for place, home in enumerate(HOMES) if file.startswith(home)]
    return (homes or [len(HOMES)])[0], file


def parse(spec: str) -> LayerCache | None:
    """What a spec asks for; None for "full", the pattern's own state. ValueError for anything else
    that is no spec of a cache, with the nearest valid name.
    """
    name, options = parse_spec(spec)
    known = kinds()
    check_choice("cache", name, (FULL, *known))
    if name != FULL:
        return known[name].parse(spec)
    if options:
        raise ValueError(f"cache: got {spec!r}, full takes no options")
    return None
