"""The plots of a measurement: time and memory against context, the roofline, and where bytes and
time go.
"""

from __future__ import annotations

from effattn.measuring.operations import GROUPS
from effattn.measuring.report_rows import by_operation, peak, short, shown_rows
from effattn.measuring.rows import MEASURED
from effattn.reports.plots import (
    PALETTE,
    RooflinePoint,
    Series,
    line_plot,
    roofline_plot,
    short_count,
    stacked_bar_plot,
)

ROOFLINE_NOTE = (
    "Work per byte moved at least (the cost model), and the speed reached; the roof is what this "
    "device was measured to do. Under the slope memory is the limit, under the flat part "
    "arithmetic is."
)
SHARES_NOTE = (
    "Bytes: the least that one decode step must move, and what is held at the peak of a prefill, "
    "by the cost model. Time: medians by operation, all layers."
)
MIB = 2**20


def _lines(report, value, band=None) -> list[Series]:
    """A line over the contexts for each variant and batch: `value(row)`, and its (low, high) by
    `band(row)`.
    """
    found, batches = [], sorted({row["batch"] for row in report.rows})
    for index, variant in enumerate(report.variants):
        for batch in batches:
            rows = [
                row
                for row in report.rows
                if (row["variant"], row["batch"], row["status"]) == (variant, batch, MEASURED)
            ]
            if all(value(row) is None for row in rows):
                continue
            label = variant if len(batches) == 1 else f"{variant}, batch {batch}"
            low, high = zip(*map(band, rows), strict=True) if band else (None, None)
            found.append(
                Series(
                    label,
                    [row["context"] for row in rows],
                    list(map(value, rows)),
                    PALETTE[index % len(PALETTE)],
                    low=low,
                    high=high,
                )
            )
    return found


def against_context(report) -> list:
    """Time to the first token, and time per token."""
    plots = []
    for phase, title in (
        ("prefill", "Time to the first token"),
        ("decode", "Time per output token"),
    ):
        lines = _lines(
            report,
            lambda row, phase=phase: row[phase]["ms_p50"],
            lambda row, phase=phase: (row[phase]["ms_p20"], row[phase]["ms_p80"]),
        )
        if lines:
            plots.append(
                line_plot(
                    title, lines, "context (tokens)", "milliseconds", contexts=True, log_y=True
                )
            )
    return plots


def memory(report) -> list:
    """Peak memory and the cache, against the context."""
    shown = []
    for title, value in (
        ("Peak memory, measured", lambda row: peak(row) and peak(row) / MIB),
        ("KV cache held", lambda row: row["kv_bytes_held"] / MIB),
    ):
        lines = _lines(report, value)
        if lines:
            shown.append(
                line_plot(title, lines, "context (tokens)", "MiB", contexts=True, log_y=True)
            )
    return shown


def roofline(report) -> list:
    """Prefill and decode of every variant at the longest context, smallest batch."""
    points, rows = [], shown_rows(report)
    if not rows:
        return []
    for row in rows:
        color = PALETTE[report.variants.index(row["variant"]) % len(PALETTE)]
        for phase, marker in (("prefill", "o"), ("decode", "s")):
            one = row[phase]
            label = f"{row['variant']}: {phase}"
            points.append(RooflinePoint(label, one["intensity"], one["flops_per_s"], color, marker))
    limits, dtype = report.data["peaks"], report.data["model"]["dtype"]
    compute = {dtype: limits["matmul_flops"].get(dtype)}
    where = f"{short_count(rows[0]['context'])} tokens, batch {rows[0]['batch']}"
    return [roofline_plot(f"Roofline at {where}", points, limits["read_bytes_per_s"], compute)]


def shares(report) -> list:
    """Stacked bars: bytes that a decode step moves and bytes held at once, by kind; time by group
    of operations.
    """
    rows = shown_rows(report)
    if not rows:
        return []
    where = f"{short_count(rows[0]['context'])} tokens, batch {rows[0]['batch']}"
    names = [row["variant"] for row in rows]

    def bars(title: str, amounts: list[dict], unit: str):
        kinds = [kind for kind in amounts[0] if any(one[kind] for one in amounts)]
        parts = [
            (kind, PALETTE[i % len(PALETTE)], [one[kind] for one in amounts])
            for i, kind in enumerate(kinds)
        ]
        totals = [f"{short(sum(one.values()))}" for one in amounts]
        return stacked_bar_plot(
            f"{title}, {where}", names, parts, unit, "", horizontal=True, totals=totals
        )

    moved = [
        {kind: size / MIB for kind, size in row["decode"]["bytes_by_kind"].items()} for row in rows
    ]
    held = []
    for row in rows:
        weights, keys, whole = (
            row["weight_bytes"],
            row["kv_bytes"],
            row["prefill"]["peak_bytes_predicted"],
        )
        sizes = {
            "weights": weights,
            "keys and values": keys,
            "activations": max(0, whole - weights - keys),
        }
        held.append({kind: size / MIB for kind, size in sizes.items()})
    plots = [
        bars("Bytes that a decode step moves", moved, "MiB"),
        bars("Memory at the peak, predicted", held, "MiB"),
    ]
    for phase, what in (("prefill", "a prefill"), ("decode", "a decode step")):
        sums = [by_operation(row[phase]) for row in rows]
        grouped = [
            {name: sum(one.get(op, 0.0) for op in group) for name, group in GROUPS.items()}
            for one in sums
        ]
        plots.append(bars(f"Time of {what}", grouped, "milliseconds"))
    return plots
