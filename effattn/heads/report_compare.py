"""A sweep of conversions on one page: several numbers of KV heads and methods side by side."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from effattn.heads.report_data import ConversionData
from effattn.reports.common import speed_ratio
from effattn.reports.figures import token_axis
from effattn.reports.page import Section, page
from effattn.reports.plots import NEUTRAL, PALETTE, Series, bar_plot, line_plot
from effattn.reports.tables import UNKNOWN, Table, number, pairs

VARIED = (
    "model",
    "refit",
    "refit_ffn",
    "grouping",
    "calibration_source",
    "calibration_tokens",
    "uptrain_tokens",
    "seed",
)


def labels(reports: Sequence[ConversionData]) -> list[str]:
    """A method's name for each report, with whatever other settings differ between them (KV heads
    are apart): "optimal + O re-fit, uptrained on 600,000 tokens"."""
    differing = [
        name
        for name in VARIED
        if len({str(report.settings.get(name)) for report in reports if name in report.settings})
        > 1
    ]
    result: list[str] = []
    seen: dict[tuple, int] = {}
    for report in reports:
        text = str(report.settings.get("method", "unknown method"))
        text += " + O re-fit" if "refit" in differing and report.settings.get("refit") else ""
        text += " + FFN re-fit" if report.settings.get("refit_ffn") else ""
        parts = [_told(name, report.settings.get(name)) for name in differing]
        text = ", ".join([text, *filter(None, parts)])
        key = (text, report.model.get("kv_heads_after"))
        seen[key] = seen.get(key, 0) + 1
        result.append(text if seen[key] == 1 else f"{text} #{seen[key]}")
    return result


def _told(name: str, value: object) -> str:
    """A setting that differs, in words; nothing for what goes without saying (no re-fit, no
    uptraining).
    """
    if name in ("model", "calibration_source"):
        return number(value)
    if name == "uptrain_tokens":
        return f"uptrained on {number(value)} tokens" if value else ""
    return "" if name in ("refit", "refit_ffn") else f"{name.replace('_', ' ')} {number(value)}"


def compare_html(reports: Sequence[ConversionData]) -> str:
    """One page for a sweep over KV heads and methods: a table, the uptraining curves, the excess
    cross-entropy.
    """
    if not reports:
        raise ValueError("reports: got none, give at least one")
    named = list(zip(labels(reports), reports, strict=True))
    # methods stay in the order given
    named.sort(key=lambda pair: -(pair[1].model.get("kv_heads_after") or 0))
    rows = []
    for label, report in named:
        timed = [row for row in report.decode if speed_ratio(row)]
        longest = max(timed, key=lambda row: row["context"]) if timed else None
        rows.append(
            [
                label,
                report.heads_text,
                number(report.kv_bytes_per_token.get("after")),
                *(number(report.measured(stage)) for stage in ("before", "converted", "uptrained")),
                *(number(report.excess(stage)) for stage in ("converted", "uptrained")),
                f"{speed_ratio(longest):.2f}x at {longest['context']:,}" if longest else UNKNOWN,
            ]
        )
    header = [
        "Method",
        "KV heads",
        "KV bytes/token",
        "Perplexity before",
        "converted",
        "uptrained",
        "Excess CE converted",
        "uptrained",
        "Decoding speed",
    ]
    if all(row[-1] == UNKNOWN for row in rows):  # a sweep without timing
        header, rows = header[:-1], [row[:-1] for row in rows]
    note = (
        "Excess CE: cross-entropy above the parent's, nats per token. Speed: after over "
        "before, at that context."
    )
    models = " and ".join(
        dict.fromkeys(str(report.settings.get("model", "model")) for report in reports)
    )
    lead = " ".join([f"{len(reports)} conversions of {models}.", *_closest(named)])
    environments = (
        [pairs("Environment", reports[0].part("environment"))]
        if reports[0].part("environment")
        else []
    )
    return page(
        f"Head conversion of {models}: a comparison",
        lead,
        [
            Section("Conversions", tables=[Table("Conversions", header, rows, note)]),
            Section(
                "Excess cross-entropy", "Cross-entropy above the parent's.", plots=excess(named)
            ),
            Section("Uptraining", plots=curves(named)),
            Section("Environment", "Of the first report.", tables=environments),
        ],
    )


def _closest(named: Sequence[tuple[str, ConversionData]]) -> list[str]:
    """A sentence for each number of KV heads: the method closest to the parent, after uptraining if
    any has it.
    """
    sentences = []
    for kv_heads in reversed(_kv_heads(named)):
        for stage, when in (
            ("uptrained", "after uptraining"),
            ("converted", "right after conversion"),
        ):
            scored = [
                (r.excess(stage), label)
                for label, r in named
                if r.model.get("kv_heads_after") == kv_heads
            ]
            scored = [one for one in scored if one[0] is not None]
            if scored:
                value, label = min(scored)
                text = (
                    f"{_heads(kv_heads)}: {label} is closest to the parent {when} "
                    f"({value:+.4f} nats/token)."
                )
                sentences.append(text)
                break
    return sentences


def _kv_heads(named: Sequence[tuple[str, ConversionData]]) -> list[int]:
    return sorted(
        {
            report.model["kv_heads_after"]
            for _, report in named
            if report.model.get("kv_heads_after")
        }
    )


def _heads(kv_heads: int) -> str:
    return "1 KV head" if kv_heads == 1 else f"{kv_heads} KV heads"


def _colors(named: Sequence[tuple[str, ConversionData]]) -> dict[str, str]:
    """A colour for each method, the same in every plot."""
    methods = dict.fromkeys(label for label, _ in named)
    return {method: PALETTE[index % len(PALETTE)] for index, method in enumerate(methods)}


def curves(named: Sequence[tuple[str, ConversionData]]) -> list[Markup]:
    """Perplexity against uptraining tokens: a plot for each number of KV heads, the parent
    dashed.
    """
    colors, plots = _colors(named), []
    for kv_heads in reversed(_kv_heads(named)):
        drawn = [
            (label, r)
            for label, r in named
            if r.curve and r.model.get("kv_heads_after") == kv_heads
        ]
        every = [point["tokens"] for _, report in drawn for point in report.curve]
        if not every:
            continue
        scaled, x_label = token_axis(every)
        place, lines, values = dict(zip(every, scaled, strict=True)), [], []
        for label, report in drawn:
            y = [point.get("perplexity") for point in report.curve]
            lines.append(
                Series(label, [place[point["tokens"]] for point in report.curve], y, colors[label])
            )
            values += [value for value in y if value is not None]
        parents = {
            round(report.curve_parent, 4) for _, report in drawn if report.curve_parent is not None
        }
        if len(parents) == 1:
            values += parents
            lines.append(
                Series("parent", [min(scaled), max(scaled)], [*parents] * 2, NEUTRAL, "--", "")
            )
        log = bool(values) and max(values) > 5 * min(values)
        plots.append(
            line_plot(f"Uptraining, {_heads(kv_heads)}", lines, x_label, "perplexity", log_y=log)
        )
    return plots


def excess(named: Sequence[tuple[str, ConversionData]]) -> list[Markup]:
    """Cross-entropy above the parent's by method, grouped by KV heads: after conversion and after
    uptraining.
    """
    heads = _kv_heads(named)
    found = {(label, report.model.get("kv_heads_after")): report for label, report in named}
    plots = []
    for stage, title in (
        ("converted", "Right after conversion"),
        ("uptrained", "After uptraining"),
    ):
        series = []
        for method, color in _colors(named).items():
            values = [
                found[method, n].excess(stage) if (method, n) in found else None for n in heads
            ]
            if any(value is not None for value in values):
                series.append((method, color, values))
        if series:
            labels, width = ("KV heads", "excess CE (nats/token)"), 10.8 if len(series) > 4 else 5.2
            plots.append(bar_plot(title, [str(n) for n in heads], series, *labels, width=width))
    return plots
