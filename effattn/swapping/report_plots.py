"""The plots of a swap report."""

from __future__ import annotations

from markupsafe import Markup

from effattn.reports.figures import MARKERS
from effattn.reports.plots import AFTER, BEFORE, NEUTRAL, PALETTE, Series, line_plot
from effattn.swapping.report_data import Run, SwapData

OTHERS = PALETTE[2:]


def _styles(report: SwapData) -> list[tuple[Run, dict]]:
    """Every run with its look, the same in all plots. Baselines are broad and dashed below the
    others: they may lie exactly under a pattern."""
    styled, others, markers = [], iter(OTHERS * 9), iter(MARKERS[1:] * 9)
    for run in report.runs:
        look = {
            "label": run["label"],
            "color": AFTER if run is report.main else None,
            "marker": "o",
            "style": "-",
        }
        if run["role"] == "before":
            look["color"] = BEFORE
        elif run["role"] == "baseline":
            look |= {"color": next(others), "marker": "", "style": "--", "width": 3.2}
        else:
            look |= {"color": look["color"] or next(others), "marker": next(markers)}
        styled.append((run, look))
    return styled


def _mark(report: SwapData, most: float) -> tuple[float, str] | None:
    """The trained length, where it lies inside a plot."""
    trained = report.trained
    return (trained, f"trained at {trained:,}") if trained and trained < most else None


def by_context(report: SwapData) -> list[Markup]:
    """Perplexity against context, log-log."""
    lines = [
        Series(
            x=[row["context"] for row in run["contexts"]],
            y=[row["perplexity"] for row in run["contexts"]],
            **style,
        )
        for run, style in _styles(report)
        if run["contexts"]
    ]
    if not lines:
        return []
    mark = _mark(report, max(lines[0].x))
    labels = ("context (tokens)", "perplexity")
    return [
        line_plot(
            "Perplexity against context",
            lines,
            *labels,
            contexts=True,
            log_y=True,
            mark=mark,
            width=10.8,
            height=3.8,
        )
    ]


def along_stream(report: SwapData) -> list[Markup]:
    """Perplexity and cache bytes along the stream."""
    lines, sizes = [], []
    for run, style in _styles(report):
        buckets, held = run["stream"]["buckets"], run["stream"]["cache_bytes"]
        lines.append(
            Series(
                x=[one["last"] for one in buckets],
                y=[one["perplexity"] for one in buckets],
                **style,
            )
        )
        x, y = zip(*held, strict=True)
        sizes.append(Series(x=x, y=[size / 2**20 for size in y], **{**style, "marker": ""}))
    fresh = report.reference
    x, y = zip(*((one["last"], one["perplexity"]) for one in fresh["buckets"]), strict=True)
    lines.append(Series(report.reference_label, x, y, NEUTRAL, ":", ""))
    mark = _mark(report, max(x))
    return [
        line_plot(
            "Perplexity along the stream",
            lines,
            "tokens streamed",
            "perplexity",
            log_y=True,
            mark=mark,
            width=10.8,
            height=4.2,
        ),
        line_plot(
            "Cache along the stream",
            sizes,
            "tokens streamed",
            "cache held (MiB)",
            log_y=True,
            mark=mark,
            width=10.8,
            height=3.2,
        ),
    ]
