"""The check of an argument that names one of several; it names the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
