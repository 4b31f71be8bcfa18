"""Errors that name the argument, what it got, what is valid, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Unsupported(ValueError):
    """What was asked is well formed, but this model or method cannot do it. Says why and what can
    be done.
    """


def check_choice(argument: str, got: str, valid: Iterable[str]) -> str:
    """Returns `got` if it is one of `valid`; otherwise raises ValueError with the nearest valid
    name.
    """
    names = list(valid)
    if got in names:
        return got
    near = difflib.get_close_matches(str(got), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{argument}: got {got!r}{hint}, valid are {', '.join(map(repr, names))}")
