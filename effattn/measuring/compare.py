"""Two result files side by side: what got slower or bigger beyond the noise, what got better, what
is missing or new.

    comparison = compare(load("before.json"), load("after.json"), tolerance=0.05)
    comparison.worse                       # [Change, ...]

Reads what `effattn measure` and the benchmarks write. A time is worse when its spread (p20 to p80)
lies wholly above the other's, and its median is more than `tolerance` above; bytes have no spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from effattn.measuring.report import KIND, check_kind
from effattn.measuring.rows import MEASURED
from effattn.reports.tables import Table, data_size

WORSE, BETTER, SAME = "worse", "better", "same"
Place = tuple[str, str]  # the row, and which of its numbers


@dataclass(frozen=True)
class Value:
    """One number that a smaller one beats: (low, median, high); or why there is none (`lost`)."""

    middle: float | None
    low: float | None = None
    high: float | None = None
    unit: str = "ms"
    lost: str = ""

    def __str__(self) -> str:
        if self.middle is None:
            return self.lost
        if self.unit == "bytes":
            return data_size(self.middle)
        return f"{self.middle:,.4g} ms"


@dataclass(frozen=True)
class Change:
    """One number in both files. `ratio`: after over before; None where one of them has no
    number.
    """

    row: str
    what: str
    before: Value
    after: Value
    ratio: float | None
    verdict: str


@dataclass
class Comparison:
    """`changes`: every number that both have. `missing` and `new`: rows that only one has.
    `warnings`: why the two may not be comparable."""

    changes: list[Change]
    missing: list[str]
    new: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def worse(self) -> list[Change]:
        """Changes for the worse, beyond the noise."""
        return [change for change in self.changes if change.verdict == WORSE]

    @property
    def better(self) -> list[Change]:
        """Changes for the better, beyond the noise."""
        return [change for change in self.changes if change.verdict == BETTER]

    def summary(self) -> str:
        """One line of JSON."""
        same = len(self.changes) - len(self.worse) - len(self.better)
        shown = [
            {
                "row": one.row,
                "what": one.what,
                "before": str(one.before),
                "after": str(one.after),
                "ratio": one.ratio and round(one.ratio, 4),
            }
            for one in self.worse
        ]
        return json.dumps(
            {
                "kind": "compare",
                "worse": shown,
                "better": len(self.better),
                "same": same,
                "missing": self.missing,
                "new": self.new,
                "warnings": self.warnings,
            }
        )

    @property
    def finding(self) -> str:
        """The verdict in a sentence."""
        if not self.worse:
            return (
                f"Nothing got slower or bigger beyond the noise ({len(self.changes)} numbers "
                "compared)."
            )
        worst = max(self.worse, key=lambda one: one.ratio or 1e9)
        how = f"{worst.row}, {worst.what}: {worst.before} -> {worst.after}"
        return f"{len(self.worse)} of {len(self.changes)} numbers got worse; the worst: {how}."

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        lines = [Text(self.finding, style="bold red" if self.worse else "bold green")]
        lines += [Text(f"warning: {warning}", style="yellow") for warning in self.warnings]
        for what, names in (("only before", self.missing), ("only after", self.new)):
            lines += [Text(f"{what}: {'; '.join(names)}")] if names else []
        return Group(*lines, *(part for table in self.tables() for part in ("", table.rich())))

    def tables(self) -> list[Table]:
        """What got worse, and what got better."""
        found = []
        for title, changes in (
            ("Slower or bigger", self.worse),
            ("Faster or smaller", self.better),
        ):
            rows = [
                (
                    one.row,
                    one.what,
                    str(one.before),
                    str(one.after),
                    "-" if one.ratio is None else f"{one.ratio:.3f}x",
                )
                for one in sorted(changes, key=lambda one: -(one.ratio or 1e9))
            ]
            if rows:
                found.append(
                    Table(title, ("Row", "What", "Before", "After", "After / before"), rows)
                )
        return found


def load(path: Path | str) -> dict:
    """A result file, checked. ValueError that names the file for corrupt, unknown and older
    ones.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error}); the file is damaged") from None
    try:
        _reader(data)(data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: lacks {error}; the file is damaged, or of another version"
        ) from None
    return data


def compare(before: dict, after: dict, tolerance: float = 0.05) -> Comparison:
    """Compares two results of the same kind. ValueError when they are of different kinds or share
    no row.
    """
    if not 0 <= tolerance < 10:
        raise ValueError(f"tolerance: got {tolerance!r}, valid is a share such as 0.05, from 0 on")
    if before.get("kind") != after.get("kind"):
        raise ValueError(
            f"kind: got {before.get('kind')!r} and {after.get('kind')!r}, valid is two of the "
            "same kind"
        )
    if before.get("version") != after.get("version"):
        versions = f"got {before.get('version')} and {after.get('version')}"
        raise ValueError(
            f"version: {versions}, valid is two results of the same: measure the older one again"
        )
    old, new = _reader(before)(before), _reader(after)(after)
    if not old.keys() & new.keys():
        raise ValueError("the two files have no row in common: nothing can be compared")
    changes = [_change(place, old[place], new[place], tolerance) for place in old if place in new]
    rows = [list(dict.fromkeys(row for row, _ in values)) for values in (old, new)]
    return Comparison(
        [change for change in changes if change is not None],
        [row for row in rows[0] if row not in rows[1]],
        [row for row in rows[1] if row not in rows[0]],
        _warnings(before, after),
    )


def _change(place: Place, before: Value, after: Value, tolerance: float) -> Change | None:
    if before.middle is None or after.middle is None:
        if before.middle is after.middle:
            return None
        return Change(*place, before, after, None, WORSE if after.middle is None else BETTER)
    if before.middle == 0:
        ratio = 1.0 if after.middle == 0 else None
        return Change(*place, before, after, ratio, SAME if after.middle == 0 else WORSE)
    ratio, verdict = after.middle / before.middle, SAME
    if ratio > 1 + tolerance and (
        after.low is None or before.high is None or after.low > before.high
    ):
        verdict = WORSE
    elif ratio < 1 / (1 + tolerance) and (
        after.high is None or before.low is None or after.high < before.low
    ):
        verdict = BETTER
    return Change(*place, before, after, ratio, verdict)


def _reader(data) -> Callable[[dict], dict[Place, Value]]:
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == KIND:
        check_kind(data)
        return _measurement
    if isinstance(kind, str) and kind.startswith("bench"):
        if not isinstance(data.get("cases"), dict):
            raise ValueError("the benchmark's result has no cases: the file is damaged")
        return _benchmark
    raise ValueError(
        f"kind: got {kind!r}, valid is a result of `effattn measure` or of a benchmark"
    )


def _measurement(data: dict) -> dict[Place, Value]:
    values: dict[Place, Value] = {}
    for row in data["rows"]:
        name = f"{row['variant']}, {row['context']:,} tokens, batch {row['batch']}"
        fits = row["status"] == MEASURED
        for phase, label in (("prefill", "time to first token"), ("decode", "time per token")):
            values[name, label] = _time(row[phase]) if fits else Value(None, lost=row["status"])
            if fits and row[phase]["peak_bytes"] is not None:
                values[name, f"peak memory, {phase}"] = Value(
                    row[phase]["peak_bytes"], unit="bytes"
                )
        if fits:
            values[name, "KV cache"] = Value(row["kv_bytes_held"], unit="bytes")
    return values


def _benchmark(data: dict) -> dict[Place, Value]:
    values: dict[Place, Value] = {}
    for case, found in data["cases"].items():
        for who, row in found["contenders"].items():
            if "ms_p50" in row:
                values[f"{case}: {who}", "time"] = _time(row)
                if row.get("peak_bytes") is not None:
                    values[f"{case}: {who}", "peak memory"] = Value(row["peak_bytes"], unit="bytes")
            elif "wrong" in row:
                values[f"{case}: {who}", "time"] = Value(None, lost="wrong result")
    return values


def _time(row: dict) -> Value:
    return Value(float(row["ms_p50"]), row.get("ms_p20"), row.get("ms_p80"))


def _warnings(before: dict, after: dict) -> list[str]:
    found = []
    for key, what in (
        ("device", "devices"),
        ("threads", "numbers of threads"),
        ("torch", "versions of torch"),
    ):
        pair = [(one.get("environment") or {}).get(key) for one in (before, after)]
        if pair[0] != pair[1]:
            found.append(f"different {what}: {pair[0]} before, {pair[1]} after")
    if before.get("kind") == KIND:
        for key in ("class", "parameters", "dtype"):
            pair = [one["model"].get(key) for one in (before, after)]
            if pair[0] != pair[1]:
                found.append(f"different models ({key}): {pair[0]} before, {pair[1]} after")
        specs = [
            {one["name"]: one["spec"] for one in data["settings"]["variants"]}
            for data in (before, after)
        ]
        for name in specs[0].keys() & specs[1].keys():
            if specs[0][name] != specs[1][name]:
                found.append(f"variant {name}: {specs[0][name]} before, {specs[1][name]} after")
    return found
