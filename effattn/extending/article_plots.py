"""The plots of `recipes/extend_context.py`: loss by position, accuracy on copies, and a heat map of
retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from effattn.evaluate.retrieval import score
from effattn.extending import article_tables as tables
from effattn.extending import tuned_report
from effattn.extending.article_data import ArticleData
from effattn.extending.rules import CLIPPED, FREQUENCIES, WINDOW
from effattn.reports.figures import AFTER, CARD, INK, empty_axes, plain, svg
from effattn.reports.plots import NEUTRAL, PALETTE, Series, bar_plot, line_plot

WIDE = {"width": 10.8, "height": 3.8}
MOST_LINES = 8


def plots(report: ArticleData) -> dict[str, list[Markup]]:
    """Section -> its figures."""
    return {
        tables.ACCURACY: [_copies(report)],
        tables.CURVES: [
            _curve(report, "natural", "Natural text"),
            _curve(report, "repeated", "Repeated text"),
        ],
        tables.RETRIEVAL: _retrieval(report),
        **tuned_report.plots(report.data.get("tuned")),
    }


def shown(report: ArticleData) -> list[dict]:
    """The rules that a plot of lines can hold: the baseline and the best of each kind, without
    log-n.
    """
    plain_rows = [row for row in report.rules if not row["logn"]]
    base, rest = plain_rows[0], plain_rows[1:]
    groups = [
        [row for row in rest if row["kind"] == FREQUENCIES and row["name"] == "pi"],
        [row for row in rest if row["name"].startswith("ntk-")],
        [row for row in rest if row["name"] == "dynamic-ntk"],
        [row for row in rest if row["name"] == "yarn"],
        [row for row in rest if row["kind"] == CLIPPED and row["name"].startswith("rerope-")],
        [row for row in rest if row["name"].startswith("leaky-")],
        [row for row in rest if row["kind"] == WINDOW],
    ]
    return [base, *(report.best(group) for group in groups if group)][:MOST_LINES]


def _curve(report: ArticleData, text: str, title: str) -> Markup:
    lines = [
        Series(
            row["name"],
            [cell["last"] for cell in row["curves"][text]],
            [cell["cross_entropy"] for cell in row["curves"][text]],
            NEUTRAL if place == 0 else PALETTE[(place - 1) % len(PALETTE)],
            width=3.0 if place == 0 else 1.8,
        )
        for place, row in enumerate(shown(report))
    ]
    return line_plot(
        f"{title}: loss by position",
        lines,
        "position (tokens)",
        "nats a token",
        mark=(report.trained, "trained length"),
        **WIDE,
    )


def _copies(report: ArticleData) -> Markup:
    rows = [row for row in report.rules if not row["logn"]]
    series = [
        ("natural", NEUTRAL, [100 * report.at(row)["accuracy"] for row in rows]),
        ("copies", AFTER, [100 * report.copied(row) for row in rows]),
    ]
    return bar_plot(
        f"Accuracy at {report.longest:,} tokens",
        [row["name"] for row in rows],
        series,
        "rule",
        "%",
        **WIDE,
    )


def _retrieval(report: ArticleData) -> list[Markup]:
    """Right answers by rule and depth; of a task that the model has not learned, nats."""
    asked = [row for row in report.rules if row["retrieval"]]
    if not asked:
        return []
    learned = report.data["task_learned"]
    depths = [f"{cell['depth']:g}" for cell in asked[0]["retrieval"]["rows"]]
    values = [
        [100 * score(cell) if learned else cell["nats"] for cell in row["retrieval"]["rows"]]
        for row in asked
    ]
    title = f"{report.data['task'].capitalize()}: " + (
        "right answers (%)" if learned else "nats of an answer token"
    )
    return [
        heat_map(
            title,
            [row["name"] for row in asked],
            depths,
            values,
            "depth (0: start, 1: end)",
            "rule",
            "{:.0f}" if learned else "{:.2f}",
        )
    ]


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    x_label: str,
    y_label: str,
    write: str = "{:.2f}",
) -> Markup:
    """A table of numbers as coloured cells, the more the darker; the numbers stand in them."""
    from matplotlib.patches import Rectangle

    figure, axes = empty_axes(1.6 + 1.1 * len(columns), 0.9 + 0.3 * len(rows), x_label, y_label)
    axes.grid(False)
    most = max((value for row in values for value in row), default=0) or 1
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            shade = {"facecolor": AFTER, "alpha": 0.05 + 0.5 * value / most, "edgecolor": CARD}
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **shade))
            axes.text(x, y, write.format(value), ha="center", va="center", fontsize=10, color=INK)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    return svg(figure, title, None, f"{y_label} by {x_label}")
