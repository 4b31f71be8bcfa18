"""Whose a state is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from effattn.states.base import State


def signed(new_state: Callable[[Any], State]) -> Callable[[Any], State]:
    """A backend's `new_state` that writes on a state whose it is."""

    @functools.wraps(new_state)
    def signed(self) -> State:
        state = new_state(self)
        state.owner = self.signature
        return state

    return signed
