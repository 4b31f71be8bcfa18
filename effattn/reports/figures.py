"""What every plot stands on: the colours, an empty figure with labelled axes, ticks, and a figure
as inline SVG.

Colours are never the only code: series differ in marker and dashes, bars in hatching. Text stays
text, and what is drawn in `INK`, `GRID` or `CARD` follows the page's CSS, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from markupsafe import Markup

# After Okabe and Ito (jfly.uni-koeln.de/color): blue, vermillion, green, then hues of the same
# lightness; each has a contrast of at least 3:1 on the light and the dark page. Before and after
# look the same in every plot.
AFTER, BEFORE, UPTRAINED = "#1a7dc0", "#d55e00", "#009e73"
PALETTE = (AFTER, BEFORE, UPTRAINED, "#a35cdb", "#8c7a10", "#c23a72", "#2590ad", "#a5673f")
NEUTRAL = "#7d8590"  # what others are compared with: a parent, a reference
# seven beside eight colours: the fifty-seventh line repeats the first
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
# no dots: they are a quarter of a megabyte a plot
HATCHES = ("", "////", "||||", "\\\\\\\\", "xxxx", "----", "++++")
# stand-ins that `svg` replaces by the page's CSS variables
INK, GRID, CARD = ("#0a0b0c", "#0d0e0f", "#0f0e0d")
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", CARD: "var(--card)"}


def plain(text: str) -> str:
    """`text` for matplotlib: a dollar sign is no mathematics here."""
    return text.replace("$", r"\$")


def short_count(n: float) -> str:
    """512, 4k, 1.5k, 128k, 1M: powers of 1024, for context lengths."""
    for size, unit in [(2**20, "M"), (2**10, "k")]:
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.4g}"


def short_si(n: float, unit: str = "") -> str:
    """0.5, 20, 3k, 1.2M, 40G, 2T: powers of 1000, for rates; with a unit "14.2 GB/s"."""
    power, prefix = next(
        ((p, x) for p, x in [(12, "T"), (9, "G"), (6, "M"), (3, "k")] if abs(n) >= 10**p), (0, "")
    )
    return f"{n / 10**power:.4g}{' ' if unit else ''}{prefix}{unit}"


def token_axis(counts: Sequence[float]) -> tuple[list[float], str]:
    """Token counts in a unit that keeps the axis short, and the unit's name."""
    largest = max(counts, default=0)
    scale, unit = (
        (1e9, "billions")
        if largest >= 2e9
        else (1e6, "millions")
        if largest >= 2e6
        else (1e3, "thousands")
    )
    return [count / scale for count in counts], f"uptraining tokens ({unit})"


def empty_axes(width: float, height: float, x_label: str, y_label: str, grid: str = "y"):
    """A matplotlib (Figure, Axes) of that size in inches, in the page's colours; `grid`: "x", "y"
    or "both".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(plain(x_label), color=INK, fontsize=11)
    axes.set_ylabel(plain(y_label), color=INK, fontsize=11)
    axes.tick_params(which="both", color=INK, labelcolor=INK, labelsize=10.5)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    return figure, axes


def context_ticks(axes, values: Sequence[float]) -> None:
    """A log2 x axis with ticks at powers of two, written 512, 4k, 1M; at most nine of them."""
    low, high = int(min(values)).bit_length() - 1, int(max(values)).bit_length()
    powers = [2**p for p in range(low, high + 1) if min(values) <= 2**p <= max(values)] or sorted(
        set(values)
    )
    ticks = powers[:: -(-len(powers) // 9)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short_count(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def log_ticks(axis, write=lambda value: f"{value:g}") -> None:
    """A log scale on a matplotlib Axis (axes.xaxis, axes.yaxis), labelled in plain numbers (0.5,
    20, 1000) at 1, 2 and 5 times powers of ten, at powers of ten only where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_formatter(NullFormatter())


def name_ticks(axis, names: Sequence[str]) -> None:
    """A tick for every name; every fourth of more than twenty, and slanted where they would run
    into each other.
    """
    every = 4 if len(names) > 20 else 1
    axis.set_ticks(range(0, len(names), every), [plain(name) for name in names[::every]])
    figure, longest = axis.get_figure(), max(map(len, names), default=0)
    if axis.axis_name == "x" and longest * len(names[::every]) > 10 * (figure.get_figwidth() - 1):
        figure.set_figheight(figure.get_figheight() + 0.04 * longest)
        axis.set_tick_params(labelrotation=25)
        for label in axis.get_ticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")


def svg(figure, title: str, axes=None, about: str = "") -> Markup:
    """A matplotlib Figure as an inline <svg> with a caption and, where several things are drawn, a
    legend.

    Text stays text, colours follow the page, there is no metadata. `about`: said by screen readers.
    """
    import matplotlib

    labels = axes.get_legend_handles_labels()[1] if axes is not None else []
    if len(labels) > 1:
        # about 12 characters an inch
        columns = int(12 * figure.get_figwidth() / (7 + max(map(len, labels))))
        columns = min(max(1, columns), len(labels))
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
        figure.legend(
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            labelcolor=INK,
            fontsize=10.5,
            handlelength=2.6,
        )
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "hatch.linewidth": 0.9}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # nothing refers to them, and every figure has the same
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for size in ("width", "height"):  # the page's CSS sizes it
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    said = ", ".join([f"{title}: {about}" if about else title, *labels]).replace(r"\$", "$")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(said)}" ', 1)
    wide = figure.get_figwidth() > 8
    return Markup(
        '<figure class="{}"><figcaption>{}</figcaption><div class="scroll">{}</div></figure>'
    ).format("wide" if wide else "plot", title, Markup(text))
