"""How time and memory grow with the length: fitted exponents beside the declared ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SLACK = 0.15  # by which a measured exponent may exceed the declared one


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log(value) over log(length) by least squares; None for fewer than three lengths,
    or values of 0.
    """
    if len(set(lengths)) < 3 or min(values) <= 0:
        return None
    x, y = ([math.log(value) for value in column] for column in (lengths, values))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return slope / sum((a - x_mean) ** 2 for a in x)


def fits(results: Mapping) -> list[dict]:
    """{"case", "of": "time" or "memory", "declared", "measured", "passes"} of every case that
    declares its growth; measured and passes are None where fewer than three lengths were measured,
    passes is in a quick run, too: its lengths are too short."""
    found = []
    for name, measured in results["cases"].items():
        if not measured["case"].get("declared"):
            continue
        rows = {who: row for who, row in measured["contenders"].items() if "ms_p50" in row}
        lengths = [int(who.removeprefix("T=")) for who in rows]
        for of, entry in (("time", "ms_p50"), ("memory", "peak_bytes")):
            declared = measured["case"]["declared"][of]
            fitted = exponent(lengths, [row[entry] for row in rows.values()]) if rows else None
            passes = (
                None
                if fitted is None or results["settings"]["quick"]
                else fitted <= declared + SLACK
            )
            found.append(
                {"case": name, "of": of, "declared": declared, "measured": fitted, "passes": passes}
            )
    return found
