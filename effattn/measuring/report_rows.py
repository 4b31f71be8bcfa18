"""The rows of a measurement as its tables and plots read them, and how numbers are written."""

from __future__ import annotations

from effattn.measuring.rows import MEASURED


def main_numbers(report, row: dict) -> dict:
    """What one row comes to, in plain units: what the last line of the terminal says."""
    shown = {key: row[key] for key in ("variant", "context", "batch", "status")}
    if row["status"] != MEASURED:
        return shown | {
            "needs_bytes": row["needs_bytes"],
            "available_bytes": row["available_bytes"],
        }
    decode = row["decode"]
    return shown | {
        "ttft_ms": _rounded(row["prefill"]["ms_p50"]),
        "ms_per_token": _rounded(decode["ms_p50"]),
        "tokens_per_s": _rounded(decode["tokens_per_s"]),
        "peak_bytes": peak(row),
        "kv_bytes": row["kv_bytes_held"],
        "gb_per_s": _rounded(decode["bytes_per_s"] / 1e9),
        "of_read_peak": _rounded(decode["bandwidth_share"]),
        "ttft_ratio": _rounded(report.ratio(row, "prefill")),
        "decode_ratio": _rounded(report.ratio(row, "decode")),
    }


def peak(row: dict) -> int | None:
    """The larger of the measured peaks of prefill and decode, in bytes."""
    known = [
        row[phase]["peak_bytes"]
        for phase in ("prefill", "decode")
        if row[phase]["peak_bytes"] is not None
    ]
    return max(known, default=None)


def shown_rows(report) -> list[dict]:
    """The rows at the longest context that was measured, smallest batch: what operations are shown
    for.
    """
    rows = measured_rows(report)
    if not rows:
        return []
    context = max(row["context"] for row in rows)
    batch = min(row["batch"] for row in rows if row["context"] == context)
    return [row for row in rows if (row["context"], row["batch"]) == (context, batch)]


def by_operation(phase: dict) -> dict[str, float]:
    """Operation -> milliseconds over all layers: the sum of the medians."""
    sums: dict[str, float] = {}
    for one in phase["operations"]:
        sums[one["name"]] = sums.get(one["name"], 0.0) + one["ms_p50"]
    return sums


def measured_rows(report) -> list[dict]:
    """Those that fit, and so were measured."""
    return [row for row in report.rows if row["status"] == MEASURED]


def several_batches(report) -> bool:
    """Whether rows differ in their batch."""
    return len({row["batch"] for row in report.rows}) > 1


def place_of(row: dict) -> list[str]:
    """A row's variant, context and batch, as cells."""
    return [row["variant"], f"{row['context']:,}", str(row["batch"])]


def shown_place(report) -> str:
    """The context and batch of `shown_rows`, in words."""
    rows = shown_rows(report)
    return f"{rows[0]['context']:,} tokens, batch {rows[0]['batch']}" if rows else "no context"


def short(value: float) -> str:
    """About three digits that mean something, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def amount(value: float | None) -> str:
    """Three digits of a number of any size."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
