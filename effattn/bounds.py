"""What a number may be, said once where it is declared (`effattn.recipes.options`), so that the
command line and Python are checked alike, before any work.

    Bounds(whole=True, least=1).check("batch", 0)    # ValueError: batch: got 0, valid is 1 or more
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST = 2**53  # what JSON can say exactly
SEED = 2**32 - 1  # numpy's seeds go no further


@dataclass(frozen=True)
class Bounds:
    """What a number may be: whole or not, at least `least`, above `above`, at most `most`; `unit`
    is what it counts.
    """

    whole: bool
    least: float | None = None
    above: float | None = None
    most: float | None = None
    unit: str = ""

    def check(self, argument: str, value: object) -> None:
        """ValueError for anything else: other types, NaN and infinities among them."""
        kinds = int if self.whole else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if fits and self.least is not None:
            fits = value >= self.least
        if fits and self.above is not None:
            fits = value > self.above
        if not fits or value > (MOST if self.most is None else self.most):
            raise ValueError(f"{argument}: got {value!r}, valid is {self}")

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.least is not None:
            said = (
                f"{self.least:g}{unit} or more"
                if self.most is None
                else f"{self.least:,} to {self.most:,}{unit}"
            )
        else:
            said = "any finite number" if self.above is None else f"more than {self.above:g}{unit}"
        return said
