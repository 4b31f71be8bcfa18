"""Numbers that a job takes, each with its bounds where it is declared.

    @dataclass
    class Job(Checked):
        batch: int = whole(2, least=1)
        lr: float | None = real(None, above=0)     # None is valid where it is the default
        contexts: Sequence[int] = whole((512, 4096), least=1)

    Job(batch=0)    # ValueError: batch: got 0, valid is 1 or more

So the command line and Python are checked alike, before any work.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields

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


def whole(default=MISSING, *, least: int, most: int | None = None, unit: str = ""):
    """A dataclass field for whole numbers: one, or where the default is a tuple, several."""
    return field(
        default=default, metadata={"bounds": Bounds(True, least=least, most=most, unit=unit)}
    )


def real(
    default=MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
):
    """A dataclass field for finite numbers."""
    return field(
        default=default, metadata={"bounds": Bounds(False, least=least, above=above, most=most)}
    )


def random_seed(default: int = 0):
    """A dataclass field for a seed of random numbers."""
    return whole(default, least=0, most=SEED)


class Checked:
    """Base of a dataclass whose numbers are within their bounds from the start. ValueError names
    the first that is not.

    None is valid where it is the default.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            if "bounds" in one.metadata:
                value = getattr(self, one.name)
                if value is None and one.default is None:
                    continue
                for number in value if isinstance(value, list | tuple) else [value]:
                    one.metadata["bounds"].check(one.name, number)
