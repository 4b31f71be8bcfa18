"""The members of an axis by name. Each is one file of the axis' package and registers itself.

RULES = Axis("positions", "position rule", "effattn.positions")

@RULES.register("nope")
class Nope(Part): ...

RULES.new("nope", {})
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ClassVar, Generic, Protocol, TypeVar

from effattn.errors import Unsupported, check_choice
from effattn.left_out import left_out


class Named(Protocol):
    """A member of an axis: a class that knows its name."""

    name: ClassVar[str]


Member = TypeVar("Member", bound=Named)


class Axis(Generic[Member]):
    """Classes by name; what a class is made with are its options."""

    def __init__(self, argument: str, called: str, package: str):
        """argument: what errors about a name begin with. called: what a member is in words.
        package: where the files are, which are imported when a member is first asked for."""
        self.argument, self.called, self.package = argument, called, package
        self._known: dict[str, type[Member]] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[type[Member]], type[Member]]:
        """Class decorator: makes a class known under `name`, which becomes its `name`."""

        def add(cls: type[Member]) -> type[Member]:
            if name in self._known:
                raise ValueError(
                    f"{self.called} {name!r} is registered already, by "
                    f"{self._known[name].__qualname__}"
                )
            cls.name = name
            self._known[name] = cls
            return cls

        return add

    def members(self) -> dict[str, type[Member]]:
        """name -> class, of every member in this version, by name."""
        # A member is known once its file has been imported: all of them, when somebody first asks
        if not self._complete:
            package = importlib.import_module(self.package)
            for file in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{file.name}")
            self._complete = True
        return dict(sorted(self._known.items()))

    def find(self, name: str) -> type[Member]:
        """The class of this name. Unsupported, with the reason, for one that is left out on
        purpose; ValueError, with the nearest valid one, for any other."""
        members = self.members()
        if name not in members and (known := left_out(self.argument, name)) is not None:
            raise Unsupported(f"{self.argument}: {known}")
        return members[check_choice(self.argument, name, members)]

    def new(self, name: str, options: dict) -> Member:
        """A new member. ValueError for unknown names and options, and for one that is missing."""
        cls = self.find(name)
        valid = options_of(cls)
        for option in options:
            check_choice(f"{name}: option", option, valid)
        missing = [p.name for p in valid.values() if p.default is p.empty and p.name not in options]
        if missing:
            raise ValueError(
                f"{name}: {', '.join(missing)} must be given, for example {name}({missing[0]}=...)"
            )
        return cls(**options)


@lru_cache(maxsize=256)  # every layer of a model asks, when it is loaded
def options_of(made: Callable) -> Mapping[str, inspect.Parameter]:
    """name -> parameter, of what a class is made with, or a function is called with."""
    return inspect.signature(made).parameters
