"""The plots of conversion reports. A list of inline SVG figures each, empty if not measured."""

from __future__ import annotations

from markupsafe import Markup

from effattn.heads.report_data import ConversionData
from effattn.reports.figures import token_axis
from effattn.reports.plots import AFTER, BEFORE, PALETTE, Series, bar_plot, line_plot

ERRORS = {  # a layer's errors: key -> (legend, colour)
    "k_error": ("keys", PALETTE[4]),
    "v_error": ("values", PALETTE[3]),
    "attention_error_merged": ("attention, before O re-fit", BEFORE),
    "attention_error": ("attention, after O re-fit", AFTER),
}
CONTEXTS = [2**power for power in range(9, 18)]  # tokens at which the KV cache is drawn


def uptraining(report: ConversionData) -> list[Markup]:
    """Perplexity and KL to the parent against uptraining tokens; the parent dashed where it is
    comparable.
    """
    points = [point for point in report.curve if point.get("perplexity") is not None]
    if not points:
        return []
    x, x_label = token_axis([point["tokens"] for point in points])
    y = [point["perplexity"] for point in points]
    lines = [Series("converted model", x, y, AFTER)]
    if report.curve_parent is not None:
        lines.append(Series("parent", [x[0], x[-1]], [report.curve_parent] * 2, BEFORE, "--", ""))
        y = [*y, report.curve_parent]
    plots = [
        line_plot(
            "Perplexity while uptraining", lines, x_label, "perplexity", log_y=max(y) > 10 * min(y)
        )
    ]
    kl = [point.get("kl") for point in points]
    if any(value is not None for value in kl):
        line = Series("KL", x, kl, AFTER)
        plots.append(
            line_plot(
                "KL to the parent while uptraining", [line], x_label, "KL (nats/token)", zero=True
            )
        )
    return plots


def layers(report: ConversionData) -> list[Markup]:
    """Relative error of keys, values and the attention output, layer by layer."""
    rows = report.layers
    series = [
        (label, color, [row.get(key) for row in rows]) for key, (label, color) in ERRORS.items()
    ]
    series = [one for one in series if any(value is not None for value in one[2])]
    if not series:
        return []
    names = [str(row["layer"]) for row in rows]
    return [
        bar_plot(
            "Error by layer",
            names,
            series,
            "layer",
            "relative squared error",
            width=10.8,
            height=3.4,
        )
    ]


def cache(report: ConversionData) -> list[Markup]:
    """KV cache size against context, log-log, for one sequence."""
    sizes = report.kv_bytes_per_token
    contexts = sorted({*CONTEXTS, *(row["context"] for row in report.decode)})
    lines = [
        Series(
            when,
            contexts,
            [sizes[when] * context / 2**20 for context in contexts],
            color,
            marker="",
        )
        for when, color in (("before", BEFORE), ("after", AFTER))
        if sizes.get(when)
    ]
    if not lines:
        return []
    labels = ("context (tokens)", "KV cache (MiB, one sequence)")
    return [line_plot("KV cache against context", lines, *labels, contexts=True, log_y=True)]


def decode(report: ConversionData) -> list[Markup]:
    """Decoding speed against context with its p20 to p80 band."""
    lines = []
    for when, color in (("before", BEFORE), ("after", AFTER)):
        rows = [row for row in report.decode if (row.get(when) or {}).get("ms_p50")]
        rows.sort(key=lambda row: row["context"])
        if rows:
            slow, middle, fast = (
                [1000 * (row.get("batch") or 1) / row[when][f"ms_p{p}"] for row in rows]
                for p in (80, 50, 20)
            )
            lines.append(
                Series(when, [row["context"] for row in rows], middle, color, low=slow, high=fast)
            )
    if not lines:
        return []
    labels = ("context (tokens)", "decoding (tokens/s)")
    return [
        line_plot("Decoding speed (band: p20 to p80)", lines, *labels, contexts=True, zero=True)
    ]
