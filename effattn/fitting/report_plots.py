"""The plots of a fit: what is lost against bytes and against time, the strip of layers, and harm by
layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from effattn.fitting.plan import FIELDS, FULL
from effattn.reports.figures import INK, empty_axes, svg
from effattn.reports.plots import AFTER, BEFORE, NEUTRAL, PALETTE, UPTRAINED, Series, line_plot

MIB = 2**20
ROWS = {
    "kv_heads": "K/V heads",
    "latent": "latents",
    "cache": "cache",
    "window": "window",
    "attention_weights": "attention weights",
    "ffn": "FFN width",
    "ffn_weights": "FFN weights",
}
COLORS = dict(zip(ROWS, (*PALETTE, *PALETTE), strict=False))
SHOWN = 5  # values of a field in a plot


def pareto(data: dict, plan: str) -> list:
    """KL and perplexity against bytes, and KL against the time of a step."""
    rows, curve = data["plans"], data["frontier"]
    groups = [
        ("the plan", AFTER, "o", [row for row in rows if row["name"].startswith(plan)]),
        ("uniform plans", BEFORE, "s", [row for row in rows if row["name"].startswith("uniform")]),
    ]

    def points(key: str, x: str, scale: float) -> list[Series]:
        found = []
        for label, color, marker, some in groups:
            known = [row for row in some if row.get(x) and row.get(key)]
            at = [row[x] / scale for row in known]
            values = [row[key] for row in known]
            if known:
                found.append(Series(label, at, values, color, style="none", marker=marker))
        return found

    figures = []
    for key, label in (("kl", "KL (nats/token)"), ("perplexity", "perplexity")):
        series = points(key, "bytes", MIB)
        if curve:
            at = [row["taken"] / MIB for row in curve]
            series.append(Series("best plans", at, [row[key] for row in curve], AFTER))
        if curve and key == "kl":
            some = [row for row in curve if row["best_uniform"] is not None]
            at = [row["limit"] / MIB for row in some]
            uniform = [row["best_uniform"] for row in some]
            series.append(Series("best uniform", at, uniform, BEFORE))
        if series:
            title = f"{'KL' if key == 'kl' else 'Perplexity'} against bytes"
            figures.append(line_plot(title, series, "MiB", label, log_y=key == "kl"))
    timed = points("kl", "ms", 1)
    if timed:
        told = ("KL against time", timed, "ms a decoding step", "KL (nats/token)")
        figures.append(line_plot(*told, log_y=True))
    return figures


def strip(choices: Sequence[dict], own: Sequence[dict]):
    """A column for each layer, a row for each field: filled where it became something else."""
    # reports of before some axes were searched do not have them
    pairs = list(zip(choices, own, strict=True))
    rows = [name for name in ROWS if any(c.get(name) != o.get(name) for c, o in pairs)]
    rows = rows or list(ROWS)[:1]
    wide = max(5.2, 0.55 * len(choices) + 1.6) if len(choices) <= 16 else 10.4
    figure, axes = empty_axes(wide, 0.42 * len(rows) + 1.0, "layer", "", grid="x")
    from matplotlib.patches import Rectangle

    for line, name in enumerate(rows):
        for index, (choice, before) in enumerate(pairs):
            changed = choice.get(name) != before.get(name)
            look = {"facecolor": COLORS[name] if changed else NEUTRAL}
            look["alpha"] = _strength(name, choice, before) if changed else 0.15
            axes.add_patch(Rectangle((index - 0.46, line - 0.42), 0.92, 0.84, **look))
            if changed and len(choices) <= 16:
                short = _short(choice[name])
                centre = {"ha": "center", "va": "center"}
                axes.text(index, line, short, color=INK, fontsize=10, **centre)
    axes.set_xlim(-0.6, len(choices) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [ROWS[name] for name in rows])
    every = 1 if len(choices) <= 16 else 2
    axes.set_xticks(range(0, len(choices), every))
    said = "the stronger the colour, the less is left; grey is as it was"
    return svg(figure, "The plan, layer by layer", axes, said)


def harm(data: dict) -> list:
    """A plot for each field: the KL of its values in each layer alone."""
    found = []
    for name in FIELDS:
        rows = [row for row in data["candidates"] if row["field"] == name]
        values = list(dict.fromkeys(row["value"] for row in rows))
        values = values[:: -(-len(values) // SHOWN)] if values else []
        series = []
        for value, color in zip(values, (*PALETTE, UPTRAINED, BEFORE), strict=False):
            own = [row for row in rows if row["value"] == value]
            layers = [row["layer"] for row in own]
            kl = [row["kl"] if row["kl"] > 0 else None for row in own]
            series.append(Series(_short(value), layers, kl, color))
        if series:
            title = f"{ROWS[name]}: one layer at a time"
            found.append(line_plot(title, series, "layer", "KL (nats/token)", log_y=True))
    return found


def _strength(name: str, choice: dict, own: dict) -> float:
    """Between .15 and .6, over which the page's ink can be read."""
    if name in ("kv_heads", "ffn"):
        return 0.6 - 0.45 * choice[name] / own[name]
    bits = re.search(r"\d+", str(choice[name]))
    strengths = {8: 0.25, 4: 0.4, 2: 0.55}
    return strengths.get(int(bits[0]), 0.35) if bits else 0.35


def _short(value) -> str:
    """A spec without the names of its options."""
    text = str(value) if value != 0 else "none"
    if text == FULL or "(" not in text:
        return text
    name, _, rest = text.partition("(")
    marks = {"rotate": "r", "residual": "+", "group": "g", "v=": "v"}
    return name + " " + "".join(mark for key, mark in marks.items() if key in rest)
