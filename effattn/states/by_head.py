"""What a pattern that differs by head remembers: a state for each group of heads, all of the same
tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from effattn.states.base import State


class HeadStates(State):
    """`parts`: the groups' states. The backend appends to each of them by itself."""

    def __init__(self, parts: list[State]):
        self.parts = parts
        self.evicts = any(part.evicts for part in parts)

    def tell(self) -> None:
        """Before a call: what the call said of all tokens, to the parts."""
        for part in self.parts:
            part.learning, part.late, part.candidates = self.learning, self.late, self.candidates

    def _seen(self) -> int:
        return self.parts[0]._seen()

    def _bytes(self) -> int:
        return sum(part._bytes() for part in self.parts)

    def tensors(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.tensors()

    def shallow(self) -> HeadStates:
        one = super().shallow()
        one.parts = [part.shallow() for part in self.parts]
        return one

    def _each(self, change: Callable[[State], None]) -> None:
        for part in self.parts:
            change(part)

    def _select(self, index: Tensor) -> None:
        self._each(lambda part: part._select(index))

    def _reorder(self, index: Tensor) -> None:
        self._each(lambda part: part._reorder(index))

    def _repeat(self, n: int) -> None:
        self._each(lambda part: part._repeat(n))

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        self._each(lambda part: part._change(how))

    def _check_crop(self, n: int) -> None:
        self._each(lambda part: part._check_crop(n))

    def _crop(self, n: int) -> None:
        self._each(lambda part: part._crop(n))

    def _reset(self) -> None:
        self._each(lambda part: part._reset())

    def _release(self) -> None:
        self._each(lambda part: part._release())
