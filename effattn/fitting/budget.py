"""A budget as people think of it, and what it allows for one model.

    budget = Budget(bytes="60%", context=2048, batch=4)
    budget.limits(parent)          # {"bytes": 50_331_648}

Amounts are numbers, or texts with a unit ("6GiB", "8 KiB", "1.5B" parameters) or as a share of what
the parent takes ("60%"). A number without a unit is bytes, parameters, or tokens a second."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from effattn.errors import check_choice

BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIMAL = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
COUNTS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
UNITS: dict[str, Mapping[str, float]] = {
    "bytes": BINARY | DECIMAL,
    "kv_bytes_per_token": BINARY | DECIMAL,
    "weight_bytes": BINARY | DECIMAL,
    "parameters": COUNTS,
    "tokens_per_s": {},
}
SAID = {
    "bytes": "bytes of weights, cache and a decoding step's activations",
    "kv_bytes_per_token": "bytes that the cache grows by with a token",
    "weight_bytes": "bytes of weights",
    "parameters": "parameters",
    "tokens_per_s": "decoded tokens a second",
}
AMOUNT = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]+|%)?\s*")

Amount = int | float | str


@dataclass(frozen=True)
class Budget:
    """Limits; one or several of them.

    bytes: of the weights, the cache of `batch` sequences of `context` tokens, and the activations
    of a decoding step. kv_bytes_per_token: what the cache grows by with a token of one sequence.
    weight_bytes. parameters. tokens_per_s: decoded by the whole batch at that context on this
    device, at least. context: tokens (None: as many as the model was trained for). ValueError for
    what is no amount, and for a budget that limits nothing."""

    bytes: Amount | None = None
    kv_bytes_per_token: Amount | None = None
    weight_bytes: Amount | None = None
    parameters: Amount | None = None
    tokens_per_s: Amount | None = None
    context: int | None = None
    batch: int = 1

    def __post_init__(self):
        if not self.given:
            raise ValueError(
                f"budget: got no limit, valid is at least one of {', '.join(UNITS)}, such as "
                "bytes='60%'"
            )
        for name, amount in self.given.items():
            amount_of(name, amount, 1.0)
        for name in ("context", "batch"):
            value = getattr(self, name)
            if (value is not None or name == "batch") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: got {value!r}, valid is a whole number of at least 1")

    @property
    def given(self) -> dict[str, Amount]:
        """The limits as they were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values[name] for name in UNITS if values[name] is not None}

    def numbers(self, parent: Mapping[str, float]) -> dict[str, float]:
        """Limit -> its number, for a parent that takes so much."""
        return {
            name: amount_of(name, amount, parent.get(name)) for name, amount in self.given.items()
        }

    def limits(self, parent: Mapping[str, float]) -> dict[str, float]:
        """Limit -> its number, for a parent that takes so much. ValueError for a budget that the
        parent meets as it is."""
        found = self.numbers(parent)
        if all(meets(name, parent[name], limit) for name, limit in found.items()):
            told = ", ".join(
                f"{name}: got {self.given[name]}, the parent has {parent[name]:,.0f}"
                for name in found
            )
            raise ValueError(f"budget: there is nothing to do ({told})")
        return found


def meets(name: str, value: float, limit: float) -> bool:
    """Whether what a plan takes is within one limit; of speed, whether it is reached."""
    return value >= limit if name == "tokens_per_s" else value <= limit


def amount_of(name: str, amount: Amount, whole: float | None) -> float:
    """The number that an amount means; whole: of the parent, for shares. ValueError for anything
    that is no positive amount of this limit."""
    units = UNITS[name]
    valid = (
        f"valid is a positive number{' of bytes' if 'bytes' in name else ''}, one with a unit "
        f"({', '.join([*units, '%'])}), such as {'60%' if not units else _example(name)}"
    )
    if isinstance(amount, bool) or not isinstance(amount, int | float | str):
        raise ValueError(f"{name}: got {amount!r}, {valid}")
    unit: str | None = None
    if isinstance(amount, str):
        match = AMOUNT.fullmatch(amount)
        if match is None:
            raise ValueError(f"{name}: got {amount!r}, {valid}")
        number, unit = float(match[1].replace(",", "").replace("_", "")), match[2]
    else:
        number = float(amount)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}: got {amount!r}, {valid}")
    if unit == "%":
        if whole is None:
            raise ValueError(f"{name}: got {amount!r}, a share of something that is not known")
        number = number / 100 * whole
    elif unit is not None:
        check_choice(f"{name}: unit", unit, (*units, "%"))
        number *= units[unit]
    return math.floor(number) if name != "tokens_per_s" else number


def _example(name: str) -> str:
    return "1.5B" if name == "parameters" else "6GiB or 60%"
