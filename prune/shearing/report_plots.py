"""The plots of a shearing's report."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from effattn.prune.shearing.report_data import DOMAINS, MASKS, NAMES, QUALITY, ShearData
from effattn.reports.figures import token_axis
from effattn.reports.plots import AFTER, NEUTRAL, PALETTE, Series, bar_plot, line_plot


def plots(report: ShearData) -> dict[str, list[Markup]]:
    """Section -> its figures."""
    return {
        QUALITY: [_perplexity(report), _losses(report)],
        MASKS: [_removed(report)],
        DOMAINS: _domains(report),
    }


def _perplexity(report: ShearData) -> Markup:
    """The parent, the sheared model and the baselines, a bar each."""
    quality = report.data["quality"]
    bars = {"the parent": quality["before"], "sheared": quality[report.last]}
    bars |= {name: row["continued"] for name, row in report.baselines.items()}
    values = [found["perplexity"] for found in bars.values()]
    return bar_plot("Perplexity", list(bars), [("perplexity", AFTER, values)], "", "perplexity")


def _losses(report: ShearData) -> Markup:
    """The held-out loss, the domains' mean, over the tokens of each run."""
    runs: dict[str, tuple[Sequence[int], list[float]]] = {}
    points = report.points()
    runs["sheared"] = (
        [tokens for tokens, _ in points],
        [_mean(point["losses"]) for _, point in points],
    )
    for name, row in report.baselines.items():
        record = row["training"]["record"]
        runs[name] = (
            [point["tokens"] for point in record],
            [_mean(point["losses"]) for point in record],
        )
    flat = [tokens for tokens, _ in runs.values() for tokens in tokens]
    scaled, unit = token_axis(flat)
    place = dict(zip(flat, scaled, strict=True))
    lines = [
        Series(name, [place[tokens] for tokens in x], y, PALETTE[index])
        for index, (name, (x, y)) in enumerate(runs.items())
    ]
    level = _mean(report.data["masks"]["references"])
    lines.append(
        Series("the parent", [min(scaled), max(scaled)], [level, level], NEUTRAL, "--", "")
    )
    return line_plot("Held-out loss while training", lines, unit, "nats a token")


def _removed(report: ShearData) -> Markup:
    """What the masks remove, and what the constraints ask for (dashed), by axis."""
    masks = report.data["masks"]
    x, unit = token_axis([point["tokens"] for point in masks["record"]])
    lines = []
    for color, axis in zip(PALETTE, masks["target"], strict=False):
        found, asked = (
            [point[what][axis] for point in masks["record"]] for what in ("removed", "target")
        )
        lines.append(Series(NAMES[axis], x, found, color))
        lines.append(Series(f"{NAMES[axis]}: target", x, asked, color, "--", ""))
    return line_plot("Share removed, expected", lines, unit, "share", zero=True)


def _domains(report: ShearData) -> list[Markup]:
    """How often each domain is read, and how far its loss is above its reference."""
    masks, points = report.data["masks"], report.points()
    x, unit = token_axis([tokens for tokens, _ in points])
    weights, above = [], []
    for index, (name, level) in enumerate(zip(masks["domains"], masks["references"], strict=True)):
        color = PALETTE[index % len(PALETTE)]
        weights.append(Series(name, x, [point["weights"][index] for _, point in points], color))
        losses = [point["losses"][index] - level for _, point in points]
        above.append(Series(name, x, losses, color))
    return [
        line_plot("Domain weights", weights, unit, "share of windows", zero=True),
        line_plot("Loss above the reference", above, unit, "nats a token"),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
