"""The results as a page: a finding on top, targets, time against length for each group of cases,
growth, peers.
"""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from bench.report import (
    case_table,
    finding,
    growth_name,
    growth_table,
    peers_table,
    targets_table,
)
from effattn.reports.page import Section, page
from effattn.reports.plots import PALETTE, Series, line_plot
from effattn.reports.tables import Table, pairs

LOOKS = ("o", "s", "^", "D", "v", "P", "X")


def html(results: Mapping) -> str:
    """The whole page; `results` as `judge` leaves them."""
    groups: dict[str, list[str]] = {}
    for name, measured in results["cases"].items():
        if not measured["case"]["declared"]:
            groups.setdefault(measured["case"]["group"], []).append(name)
    sections = [Section("Targets", tables=[targets_table(results)])]
    for group, names in groups.items():
        tables = [case_table(name, results) for name in names]
        for table in tables:
            table.folded = len(tables) > 1
        plots = plot_of_group(results, group)
        sections.append(Section(group, plots=plots, tables=tables))
    sections.append(Section("Growth", plots=_growth_plots(results), tables=[growth_table(results)]))
    sections.append(Section("Peers", tables=[peers_table(results)]))
    sections.append(Section("Where and with what", tables=_settings(results)))
    where = results.get("environment") or {}
    return page(
        f"effattn bench: {where.get('device', results['settings']['name'])}",
        finding(results),
        sections,
    )


def plot_of_group(results: Mapping, group: str, **size: float) -> list[Markup]:
    """Median time against length with the band from p20 to p80, ours as solid lines; nothing for a
    single length.
    """
    lines: dict[str, list[tuple[int, dict]]] = {}
    for measured in results["cases"].values():
        if measured["case"]["group"] == group:
            for who, row in measured["contenders"].items():
                if "ms_p50" in row:
                    lines.setdefault(who, []).append((measured["case"]["tokens"], row))
    if len({tokens for points in lines.values() for tokens, _ in points}) < 2:
        return []
    series = []
    for index, (who, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        rows = [row for _, row in points]
        series.append(_series(index, who, [tokens for tokens, _ in points], rows, rows[0]["ours"]))
    size = size or ({"width": 9, "height": 5} if len(series) > 6 else {})
    return [line_plot(group, series, "tokens", "milliseconds", contexts=True, log_y=True, **size)]


def _series(index: int, label: str, lengths: list[int], rows: list[dict], ours: bool) -> Series:
    low, middle, high = ([row[f"ms_{p}"] for row in rows] for p in ("p20", "p50", "p80"))
    style = "--" if not ours else "-" if index < len(PALETTE) else ":"
    return Series(
        label,
        lengths,
        middle,
        PALETTE[index % len(PALETTE)],
        style,
        LOOKS[index % len(LOOKS)],
        low,
        high,
    )


def _growth_plots(results: Mapping) -> list[Markup]:
    """Time and peak memory against length, every case that declares its growth."""
    plots = []
    for entry, scale, unit in (
        ("ms_p50", 1, "milliseconds"),
        ("peak_bytes", 2**-20, "peak memory, MiB"),
    ):
        series = []
        for case, measured in results["cases"].items():
            rows = {who: row for who, row in measured["contenders"].items() if row.get(entry)}
            if measured["case"]["declared"] and rows:
                index = len(series)
                lengths = [int(who.removeprefix("T=")) for who in rows]
                values = [row[entry] * scale for row in rows.values()]
                series.append(
                    Series(
                        growth_name(results, case),
                        lengths,
                        values,
                        PALETTE[index % len(PALETTE)],
                        "-" if index < len(PALETTE) else "--",
                        LOOKS[index % len(LOOKS)],
                    )
                )
        if series:
            plots.append(
                line_plot(
                    f"Growth: {unit}",
                    series,
                    "tokens",
                    unit,
                    contexts=True,
                    log_y=True,
                    width=9,
                    height=5,
                )
            )
    return plots


def _settings(results: Mapping) -> list[Table]:
    tables = [
        pairs("Environment", results.get("environment") or {}),
        pairs("Settings", results["settings"]),
    ]
    if peaks := results.get("peaks"):
        flat = {
            f"matmul {name} TFLOP/s": flops and flops / 1e12
            for name, flops in peaks["matmul_flops"].items()
        }
        flat |= {
            f"{name} GB/s": peaks[f"{name}_bytes_per_s"] and peaks[f"{name}_bytes_per_s"] / 1e9
            for name in ("copy", "read", "write")
        }
        flat |= {"launch microseconds": peaks["launch_seconds"] and peaks["launch_seconds"] * 1e6}
        tables.append(pairs("What the device can do, measured", flat, "not known"))
    return tables
