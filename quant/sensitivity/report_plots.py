"""The plots of a report of quantized caches."""

from __future__ import annotations

from markupsafe import Markup

from effattn.evaluate.retrieval import score
from effattn.quant.sensitivity import report_tables as tables
from effattn.quant.sensitivity.report_data import QuantizeData
from effattn.reports.plots import AFTER, BEFORE, NEUTRAL, PALETTE, Series, bar_plot, line_plot

WIDE = {"width": 10.8, "height": 3.8}


def plots(report: QuantizeData) -> dict[str, list[Markup]]:
    """Section -> its figures."""
    return {
        tables.QUALITY: _trade(report),
        tables.LAYERS: _layers(report),
        tables.RETRIEVAL: _retrieval(report),
        tables.MEMORY: _memory(report),
        tables.SPEED: _speed(report),
    }


def _colors(report: QuantizeData) -> dict[str, str]:
    """Each cache's colour, the same in all plots."""
    quantized = [color for color in PALETTE if color != BEFORE]
    names = [row["name"] for row in report.rows]
    return {names[0]: BEFORE} | {
        name: quantized[place % len(quantized)] for place, name in enumerate(names[1:])
    }


def _trade(report: QuantizeData) -> list[Markup]:
    """KL against bytes a token: the formats as measured, and the plans as their layers' sums
    say.
    """
    points = [
        (row["bytes_per_token"], row["quality"]["kl"], row["name"]) for row in report.rows[1:]
    ]
    colors, lines = _colors(report), []
    front = [
        (one["bytes_per_token"], one["kl"]) for one in report.data["frontier"] if one["kl"] > 0
    ]
    if len(front) > 1:
        x, y = zip(*front, strict=True)
        lines.append(Series("best plans (sums over layers)", x, y, NEUTRAL, ":", ""))
    lines += [Series(name, [x], [y], colors[name], "") for x, y, name in points if y and y > 0]
    if not lines:
        return []
    return [
        line_plot(
            "KL against bytes a token",
            lines,
            "bytes a token, all layers",
            "KL (nats/token)",
            log_y=True,
            **WIDE,
        )
    ]


def _layers(report: QuantizeData) -> list[Markup]:
    alone = report.data["sensitivity"]
    if not alone:
        return []
    layers, colors = list(dict.fromkeys(row["layer"] for row in alone)), _colors(report)
    series = [
        (spec, colors.get(spec, AFTER), [row["kl"] for row in alone if row["spec"] == spec])
        for spec in dict.fromkeys(row["spec"] for row in alone)
    ]
    return [
        bar_plot(
            "KL of each layer alone",
            [str(layer) for layer in layers],
            series,
            "layer",
            "KL (nats/token)",
            **WIDE,
        )
    ]


def _retrieval(report: QuantizeData) -> list[Markup]:
    """Right answers by depth; of a task that the model itself cannot do anywhere, the nats of its
    answers.
    """
    found, colors = [row for row in report.data["retrieval"] if row["rows"]], _colors(report)
    figures = []
    for task in dict.fromkeys(row["task"] for row in found):
        own = [row for row in found if row["task"] == task]
        learned = any(one["learned"] for one in own[0]["rows"])
        lines = [
            Series(
                row["lane"],
                [one["depth"] for one in row["rows"]],
                [100 * score(one) if learned else one["nats"] for one in row["rows"]],
                colors[row["lane"]],
                width=3.4 if row["lane"] == report.full["name"] else 1.8,
            )
            for row in own
        ]
        label = "right (%)" if learned else "nats of an answer token"
        figures.append(
            line_plot(task.capitalize(), lines, "depth (0: start, 1: end)", label, zero=True)
        )
    return figures


def _memory(report: QuantizeData) -> list[Markup]:
    weights, colors = report.data["model"]["weight_bytes"], _colors(report)
    lines = [
        Series(
            row["name"],
            [one["context"] for one in row["memory"]],
            [(weights + one["bytes"]) / 2**20 for one in row["memory"]],
            colors[row["name"]],
        )
        for row in report.rows
    ]
    return [
        line_plot(
            "Weights and cache of one sequence",
            lines,
            "context (tokens)",
            "MiB",
            contexts=True,
            log_y=True,
            **WIDE,
        )
    ]


def _speed(report: QuantizeData) -> list[Markup]:
    timed, colors, figures = (
        [row for row in report.data["decode"] if "lane" in row],
        _colors(report),
        [],
    )
    for batch in dict.fromkeys(row["batch"] for row in timed):
        lines = []
        for name in dict.fromkeys(row["lane"] for row in timed):
            own = [row for row in timed if (row["lane"], row["batch"]) == (name, batch)]
            x, y = [row["context"] for row in own], [row["ms"] for row in own]
            low, high = [row["ms_p20"] for row in own], [row["ms_p80"] for row in own]
            lines.append(Series(name, x, y, colors[name], low=low, high=high))
        figures.append(
            line_plot(
                f"A decoding step, batch {batch}",
                lines,
                "context (tokens)",
                "ms",
                contexts=True,
                zero=True,
            )
        )
    return figures
