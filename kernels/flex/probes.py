"""What is known of functions of scalars by running them once, with arguments that can do little:
whether a score_mod only adds to scores (then what it adds is a mask of the fused kernel), and
whether functions go by the distance alone (then all tiles that look alike have the same mask)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

ADD = ("add", "__add__", "__radd__", "__iadd__", "add_")
SUBTRACT = ("sub", "subtract", "__sub__", "__isub__", "sub_")


def is_additive(score_mod: Callable, like: Tensor) -> bool:
    """Whether its result is the score plus something that does not depend on it, or -inf, by a run
    with a score that can nothing else. like: on whose device indices are."""
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    try:
        return isinstance(score_mod(_Score(), *[zero] * 4), _Score)
    except Exception:  # whatever it does with a score that is no number: it is not only added to
        return False


def by_distance(
    mod: Callable | None,
    like: Tensor,
    score: bool = False,
) -> bool:
    """Whether a mask_mod (with `score`: a score_mod) asks of the positions of query and key no more
    than how they differ, and which is larger."""
    if mod is None:
        return True
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    given = (torch.zeros((), device=like.device),) if score else ()
    try:
        mod(
            *given,
            zero,
            zero,
            _Place(True, zero),
            _Place(False, zero),
        )
    except Exception:  # whatever else it does with a place
        return False
    return True


class _Place:
    """The position of a query or a key, of which only the difference to the other one is told."""

    def __init__(
        self,
        query: bool,
        zero: Tensor,
    ):
        self.query, self.zero = query, zero

    def _beside(
        self,
        other,
        result: Callable,
    ) -> Tensor:
        if not isinstance(other, _Place) or other.query == self.query:
            raise TypeError("a place is asked for its value")
        return result(self.zero, self.zero)

    def __sub__(self, other):
        return self._beside(other, operator.sub)

    def __lt__(self, other):
        return self._beside(other, operator.lt)

    def __le__(self, other):
        return self._beside(other, operator.le)

    def __gt__(self, other):
        return self._beside(other, operator.gt)

    def __ge__(self, other):
        return self._beside(other, operator.ge)

    def __eq__(self, other):
        return self._beside(other, operator.eq)

    def __ne__(self, other):
        return self._beside(other, operator.ne)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self):
        raise TypeError("a place is asked for its value")

    @classmethod
    def __torch_function__(
        cls,
        function,
        types,
        args=(),
        kwargs=None,
    ):
        raise TypeError("a place is asked for its value")


class _Score:
    """A score to which something may be added, and which `torch.where` may replace by -inf.
    Anything else that is done with it raises."""

    def __add__(self, other):
        return _plus(self, other)

    __radd__ = __add__

    def __sub__(self, other):
        return _plus(self, other)

    def __bool__(self):
        raise TypeError("a score is asked for its value")

    @classmethod
    def __torch_function__(
        cls,
        function,
        types,
        args=(),
        kwargs=None,
    ):
        name, first = getattr(function, "__name__", ""), args[0] if args else None
        alone = [isinstance(x, cls) for x in args]
        added = name in ADD or (name in SUBTRACT and isinstance(first, cls))
        if not kwargs and len(args) == 2 and added:
            return _plus(*args)
        hidden = [isinstance(x, float) and x == -math.inf for x in args]
        chosen = len(args) == 3 and all(a or b for a, b in zip(alone[1:], hidden[1:], strict=True))
        if not kwargs and name == "where" and chosen and not alone[0]:
            return cls()
        raise TypeError(f"{name} of a score")


def _plus(one, other) -> _Score:
    if isinstance(one, _Score) and isinstance(other, _Score):
        raise TypeError("a score is added to a score")
    return _Score()
