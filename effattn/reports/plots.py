"""The plots of reports, each an inline SVG figure: lines, bars, stacked bars, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from effattn.reports.figures import (
    AFTER,
    BEFORE,
    CARD,
    DASHES,
    HATCHES,
    INK,
    MARKERS,
    NEUTRAL,
    PALETTE,
    UPTRAINED,
    context_ticks,
    empty_axes,
    log_ticks,
    name_ticks,
    plain,
    short_count,
    short_si,
    svg,
)

__all__ = [
    "AFTER",
    "BEFORE",
    "NEUTRAL",
    "PALETTE",
    "UPTRAINED",
    "RooflinePoint",
    "Series",
    "bar_plot",
    "line_plot",
    "roofline_plot",
    "short_count",
    "short_si",
    "stacked_bar_plot",
    "svg",
]


@dataclass
class Series:
    """One line of a plot; `low` and `high` give its band. None in `y` is a gap. Wide lines lie
    below thin ones.

    `style` (dashes) and `marker` are matplotlib's; where None, the line's place in the plot chooses
    them."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    style: str | tuple | None = None
    marker: str | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    width: float = 1.8


@dataclass
class RooflinePoint:
    """A measurement on a roofline: FLOPs per byte moved, and FLOP/s reached. None where it was not
    measured.
    """

    label: str
    flop_per_byte: float | None
    flop_per_s: float | None
    color: str
    marker: str = "o"


def line_plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    contexts: bool = False,
    log_y: bool = False,
    zero: bool = False,
    mark: tuple[float, str] | None = None,
    width: float = 5.2,
    height: float = 3.0,
) -> Markup:
    """Lines over x. `contexts`: x are token counts on a log2 axis; `zero`: the y axis starts at 0;
    `mark`: an x with a dotted line and its name."""
    figure, axes = empty_axes(width, height, x_label, y_label)
    shown = [
        value for one in series for value in one.y if value is not None and math.isfinite(value)
    ]
    log_y = log_y and any(value > 0 for value in shown)  # no axis has the logarithm of nothing
    for index, one in enumerate(series):
        # a gap
        y = [value if value is not None and math.isfinite(value) else math.nan for value in one.y]
        style = DASHES[index % len(DASHES)] if one.style is None else one.style
        marker = MARKERS[index % len(MARKERS)] if one.marker is None else one.marker
        look = {
            "linewidth": one.width,
            "zorder": 2 + 1 / one.width,
            "color": one.color,
            "label": plain(one.label),
        }
        axes.plot(one.x, y, linestyle=style, marker=marker, markersize=5, **look)
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=one.color, alpha=0.2, linewidth=0)
    if contexts:
        context_ticks(axes, [x for one in series for x in one.x])
    elif max((x for one in series for x in one.x), default=0) >= 1000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if log_y:
        log_ticks(axes.yaxis)
    if zero:
        axes.set_ylim(bottom=0)
    if mark:
        low, high = axes.get_ylim()
        if not log_y:
            axes.set_ylim(top=high + 0.1 * (high - low))  # the name's own place
        else:
            axes.set_ylim(top=high * (high / low) ** 0.1)
        axes.axvline(mark[0], color=INK, linestyle=":", linewidth=1)
        top = axes.get_xaxis_transform()
        axes.annotate(
            plain(mark[1]),
            (mark[0], 1),
            (4, -2),
            xycoords=top,
            textcoords="offset points",
            va="top",
            fontsize=10,
            color=INK,
        )
    return svg(figure, title, axes, f"{y_label} against {x_label}")


def bar_plot(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    x_label: str,
    y_label: str,
    *,
    width: float = 5.2,
    height: float = 3.0,
) -> Markup:
    """Grouped bars, `series` = (label, colour, a value a group or None); log scale where values
    spread over 30x.
    """
    figure, axes = empty_axes(width, height, x_label, y_label)
    thick = 0.8 / max(1, len(series))
    for index, (label, color, values) in enumerate(series):
        at = [group + (index - (len(series) - 1) / 2) * thick for group in range(len(groups))]
        heights = [math.nan if value is None else value for value in values]
        axes.bar(at, heights, thick * 0.94, color=color, label=plain(label), **_hatched(index))
    known = [value for _, _, values in series for value in values if value is not None]
    positive = [value for value in known if value > 0]
    if positive and min(known) >= 0 and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(positive) / 2)
        log_ticks(axes.yaxis)
    name_ticks(axes.xaxis, groups)
    return svg(figure, title, axes, f"{y_label} by {x_label}")


def stacked_bar_plot(
    title: str,
    groups: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float | None]]],
    x_label: str,
    y_label: str,
    *,
    horizontal: bool = False,
    totals: Sequence[str] = (),
    width: float = 5.2,
    height: float | None = None,
) -> Markup:
    """A bar for each group, made of `parts` = (label, colour, a value a group; None and 0 draw
    nothing).

    `x_label` is the horizontal axis' and `y_label` the vertical one's, whichever way the bars run:
    with `horizontal` the groups are on the vertical axis, the first on top. `totals` are texts at
    the ends of the bars."""
    height = height or (0.34 * len(groups) + 1 if horizontal else 3)
    figure, axes = empty_axes(width, height, x_label, y_label, grid="x" if horizontal else "y")
    ends = [0.0] * len(groups)
    for index, (label, color, values) in enumerate(parts):
        sizes = [value or 0.0 for value in values]
        draw, thickness = (axes.barh, "height") if horizontal else (axes.bar, "width")
        start = {"left" if horizontal else "bottom": list(ends)}
        draw(
            range(len(groups)),
            sizes,
            color=color,
            label=plain(label),
            **start,
            **{thickness: 0.7},
            **_hatched(index),
        )
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    name_ticks(axes.yaxis if horizontal else axes.xaxis, groups)
    if horizontal:
        axes.invert_yaxis()
    for place, text in enumerate(totals):
        at, shift = ((ends[place], place), (4, 0)) if horizontal else ((place, ends[place]), (0, 3))
        axes.annotate(
            plain(text),
            at,
            shift,
            textcoords="offset points",
            fontsize=10,
            color=INK,
            ha="left" if horizontal else "center",
            va="center" if horizontal else "bottom",
        )
    if totals:
        axes.margins(**({"x": 0.16} if horizontal else {"y": 0.12}))
    said = (x_label, y_label) if horizontal else (y_label, x_label)
    return svg(figure, title, axes, " by ".join(filter(None, said)))


def _hatched(index: int) -> dict:
    return {"hatch": HATCHES[index % len(HATCHES)], "edgecolor": CARD, "linewidth": 0.8}


def roofline_plot(
    title: str,
    points: Sequence[RooflinePoint],
    bandwidth: float | None,
    compute: dict[str, float | None],
    *,
    x_label: str = "arithmetic intensity (FLOP per byte)",
    y_label: str = "reached (FLOP/s)",
    width: float = 10.8,
    height: float = 3.9,
) -> Markup:
    """Measurements under the roof min(intensity * bandwidth, compute), log-log (Williams et al.,
    CACM 52(4), 2009).

    `bandwidth` in bytes/s and `compute` {dtype: FLOP/s} are measured peaks; no roof is drawn for
    what is None. Points that were not measured are left out."""
    drawn = [one for one in points if one.flop_per_byte and one.flop_per_s]
    peaks = {name: peak for name, peak in compute.items() if peak}
    if not drawn:
        raise ValueError(
            "points: got none with both flop_per_byte and flop_per_s, give at least one"
        )
    ridges = [peak / bandwidth for peak in peaks.values()] if bandwidth else []
    low = min([one.flop_per_byte for one in drawn] + ridges) / 4
    high = max([one.flop_per_byte for one in drawn] + ridges) * 4
    figure, axes = empty_axes(width, height, x_label, y_label, grid="both")
    axes.set(xscale="log", yscale="log")
    if bandwidth:
        end = max(ridges, default=high)
        memory = f"memory, measured: {short_si(bandwidth, 'B/s')}"
        axes.plot(
            [low, end], [low * bandwidth, end * bandwidth], color=INK, linewidth=1.8, label=memory
        )
    for index, (name, peak) in enumerate(peaks.items()):
        start, style = peak / bandwidth if bandwidth else low, DASHES[index % len(DASHES)]
        label = plain(f"{name}, measured: {short_si(peak, 'FLOP/s')}")
        axes.plot(
            [start, high], [peak, peak], color=NEUTRAL, linewidth=1.8, linestyle=style, label=label
        )
    for one in drawn:
        axes.plot(
            [one.flop_per_byte],
            [one.flop_per_s],
            linestyle="",
            marker=one.marker,
            markersize=8,
            color=one.color,
            markeredgecolor=CARD,
            label=plain(one.label),
            zorder=3,
        )
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis, short_si)
    if ridges:  # what bounds the work on either side of where the highest roof bends
        bend = max(ridges)
        axes.axvline(bend, color=INK, linestyle=":", linewidth=1)
        for text, side, shift in (("memory-bound", "right", -6), ("compute-bound", "left", 6)):
            axes.annotate(
                text,
                (bend, 0),
                (shift, 6),
                xycoords=axes.get_xaxis_transform(),
                ha=side,
                textcoords="offset points",
                fontsize=10,
                color=INK,
            )
    return svg(figure, title, axes, f"{y_label} against {x_label}")
