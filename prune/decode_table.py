"""The table of decoding speeds before and after a pruning."""

from __future__ import annotations

from effattn.heads.report_tables import speed
from effattn.reports.tables import Table, data_size, number

DECODING = "Decoding"


def decode_table(timed: list[dict], note: str = "") -> Table:
    """timed: rows by context, with "before" and "after" of `effattn.profiling.decode`; note: one
    sentence more.
    """
    rows = []
    for row in timed:
        before, after = (row.get(when) or {} for when in ("before", "after"))
        rows.append(
            [
                number(row["context"]),
                speed(before),
                speed(after),
                data_size(before.get("kv_bytes")),
                data_size(after.get("kv_bytes")),
            ]
        )
    header = ("Context", "Before (tokens/s)", "After (tokens/s)", "KV before", "KV after")
    said = "Context in tokens; greedy single-token steps, the models taking turns."
    return Table(DECODING, header, rows, f"{said} {note}".rstrip())
