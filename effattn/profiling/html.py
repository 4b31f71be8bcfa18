"""Self-contained report pages: tables, plots as inline SVG, one template, files written atomically.

A `Table` renders to HTML (through the template), Markdown and the terminal, so that all three say the same. Plots
take their text and grid colours from the page's CSS and are readable on light and dark backgrounds.
"""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

# Mid-tones with at least 3:1 contrast on white and on the dark page; before and after look the same in every plot.
BEFORE, AFTER, UPTRAINED = "#d1711f", "#2f86d6", "#2a9d6f"
PALETTE = (AFTER, BEFORE, UPTRAINED, "#c4548c", "#8067d6", "#8c7a3f", "#3a9aa8", "#b8473d")
_INK, _GRID = "#0a0b0c", "#0d0e0f"  # stand-ins that `svg` replaces by the page's CSS variables


@dataclass
class Table:
    """Cells are ready-made text; the first column is text, the others are numbers (right-aligned)."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False  # HTML: behind a <details> line

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        body = "\n".join(f"| {' | '.join(markdown_text(cell) for cell in line)} |" for line in lines)
        return f"**{markdown_text(self.title)}**\n\n{body}" + (f"\n\n{markdown_text(self.note)}" if self.note else "")

    def rich(self):
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title, style="bold"), caption=Text(self.note) if self.note else None)
        table.title_justify = table.caption_justify = "left"
        for index, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


@dataclass
class Passage:
    """Text to read: `given` (a prompt), what follows it, and, behind a line that says `border`, the rest."""

    title: str
    given: str
    text: str
    border: str = ""
    rest: str = ""

    def markdown(self) -> str:
        body = self.given + self.text + (f"\n----- {self.border} -----\n{self.rest}" if self.rest else "")
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
        return f"**{markdown_text(self.title)}**\n\n{fence}text\n{body}\n{fence}"


@dataclass
class Section:
    """A heading with its plots, tables and passages."""

    title: str
    note: str = ""
    plots: list[Markup] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)


@dataclass
class Series:
    """One line of a plot; `low` and `high` give its band. None in `y` is a gap. Wide lines lie below thin ones."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    style: str = "-"
    marker: str = "o"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    width: float = 1.5


def markdown_text(text: str) -> str:
    """`text` as it is in a Markdown table cell: no cell ends, no HTML, one line."""
    return " ".join(str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<").split())


def render(template: str, **values: object) -> str:
    """The template of that name in `templates/`, with autoescape on; a missing value is an error."""
    folder = Path(__file__).with_name("templates")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole HTML page: no script, no request to anywhere."""
    shown = [s for s in sections if s.plots or s.tables or s.passages]
    return render("page.html.jinja", title=title, lead=lead, sections=shown)


def _axes(width: float, height: float, x_label: str, y_label: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(_plain(x_label), color=_INK)
    axes.set_ylabel(_plain(y_label), color=_INK)
    axes.tick_params(which="both", color=_INK, labelcolor=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    return figure, axes


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign is no mathematics here


def _power_of_two_ticks(axes, values: Sequence[float]) -> None:
    """Ticks at powers of two, written 512, 4k, 1M; at most nine of them."""
    low, high = int(min(values)).bit_length() - 1, int(max(values)).bit_length()
    powers = [2**p for p in range(low, high + 1) if min(values) <= 2**p <= max(values)] or sorted(set(values))
    ticks = powers[:: -(-len(powers) // 9)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short_count(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _log_y(axes) -> None:
    """A log axis with plain numbers (0.5, 20, 1000) at 1, 2 and 5 times powers of ten, fewer over many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short_count(n: float) -> str:
    """512, 4k, 1.5k, 128k, 1M: powers of 1024, for context lengths."""
    for size, unit in [(2**20, "M"), (2**10, "k")]:
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.4g}"


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
    height: float = 3.1,
) -> Markup:
    """Lines over x. `contexts`: x are token counts on a log2 axis; `zero`: the y axis starts at 0; `mark`: an x with
    a dotted line and its name."""
    figure, axes = _axes(width, height, x_label, y_label)
    for one in series:
        y = [float("nan") if value is None else value for value in one.y]
        look = {"linewidth": one.width, "zorder": 2 + 1 / one.width, "color": one.color, "label": _plain(one.label)}
        axes.plot(one.x, y, one.style, marker=one.marker, markersize=4, **look)
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=one.color, alpha=0.2, linewidth=0)
    if contexts:
        _power_of_two_ticks(axes, [x for one in series for x in one.x])
    elif max((x for one in series for x in one.x), default=0) >= 1000:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if log_y:
        _log_y(axes)
    if zero:
        axes.set_ylim(bottom=0)
    if mark:
        low, high = axes.get_ylim()
        axes.set_ylim(top=high * (high / low) ** 0.1 if log_y else high + 0.1 * (high - low))  # the name's own place
        axes.axvline(mark[0], color=_INK, linestyle=":", linewidth=1)
        top = axes.get_xaxis_transform()
        axes.annotate(_plain(mark[1]), (mark[0], 1), (4, -2), xycoords=top, textcoords="offset points", va="top",
                      fontsize=8, color=_INK)  # fmt: skip
    return svg(figure, title, axes)


def bar_plot(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    x_label: str,
    y_label: str,
    *,
    width: float = 5.2,
    height: float = 3.1,
) -> Markup:
    """Grouped bars, `series` = (label, colour, a value a group or None); log scale where values spread over 30x."""
    figure, axes = _axes(width, height, x_label, y_label)
    thick = 0.8 / max(1, len(series))
    for index, (label, color, values) in enumerate(series):
        at = [group + (index - (len(series) - 1) / 2) * thick for group in range(len(groups))]
        heights = [float("nan") if value is None else value for value in values]
        axes.bar(at, heights, thick * 0.92, color=color, label=_plain(label))
    known = [value for _, _, values in series for value in values if value is not None]
    positive = [value for value in known if value > 0]
    if positive and min(known) >= 0 and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(positive) / 2)
        _log_y(axes)
    axes.set_xticks(range(len(groups)), [_plain(group) for group in groups])
    if len(groups) > 20:
        axes.set_xticks(range(0, len(groups), 4), groups[::4])
    return svg(figure, title, axes)


def svg(figure, title: str, axes=None) -> Markup:
    """A matplotlib Figure as an inline <svg> with a caption: text stays text, colours follow the page, no metadata."""
    import matplotlib

    labels = axes.get_legend_handles_labels()[1] if axes is not None else []
    if len(labels) > 1:
        columns = max(1, int(13 * figure.get_figwidth() / (6 + max(map(len, labels)))))  # about 13 characters an inch
        figure.legend(
            loc="outside upper left", ncols=min(columns, len(labels)), frameon=False, labelcolor=_INK, fontsize=9
        )
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for size in ("width", "height"):  # the page's CSS sizes it
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    text = text.replace(_INK, "var(--ink)").replace(_GRID, "var(--grid)")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1)
    wide = figure.get_figwidth() > 8
    return Markup('<figure class="{}"><figcaption>{}</figcaption>{}</figure>').format(
        "wide" if wide else "plot", title, Markup(text)
    )


def write_all_atomic(folder: Path | str, files: dict[str, str]) -> None:
    """Writes `files` {name: text} into `folder` (made if need be), the last one last.

    Every text is on disk under a temporary name before the first is put in place: a full disk or a bad text
    changes nothing and leaves nothing behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged: list[tuple[Path, Path]] = []
    try:
        for name, text in files.items():
            temporary = folder / f".{name}.{uuid.uuid4().hex}.tmp"
            staged.append((temporary, folder / name))
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in staged:
            os.replace(temporary, final)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Writes `text` to `path` by a temporary file beside it, fsync and replace."""
    path = Path(path)
    write_all_atomic(path.parent, {path.name: text})
