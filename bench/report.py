"""What was measured, as tables: a case, the targets, growth beside what is declared, and the
peers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from bench.run import faults
from effattn.reports.tables import Table, data_size

VERDICT = {True: "pass", False: "falls short", None: "not measured"}


def case_table(name: str, results: Mapping) -> Table:
    """Times in milliseconds, how many times ours (the first of ours) each takes, and what is known
    beside.
    """
    rows = results["cases"][name]["contenders"]
    timed = {who: row for who, row in rows.items() if "ms_p50" in row}
    base = next((row["ms_p50"] for row in timed.values() if row["ours"]), None)
    launched = timed and all("host_ms" in row for row in timed.values())
    columns = {
        "p20 ms": lambda row: milliseconds(row["ms_p20"]),
        "p50 ms": lambda row: milliseconds(row["ms_p50"]),
        "p80 ms": lambda row: milliseconds(row["ms_p80"]),
        **({"host ms": lambda row: milliseconds(row["host_ms"])} if launched else {}),
        "over ours": lambda row: f"{row['ms_p50'] / base:.2f}x" if base else "-",
        "peak memory": lambda row: data_size(row["peak_bytes"]),
    }
    if (
        any(row.get("read_share") for row in timed.values())
        and results["cases"][name]["case"]["what"] in DECODING
    ):
        columns |= {
            "state": lambda row: data_size(row["state_bytes"]),
            "read GB/s": lambda row: f"{row['read_gb_per_s']:,.1f}",
            "of the peak": lambda row: _share(row["read_share"]),
        }
    elif any(row.get("limit_share") for row in timed.values()):
        columns["of the limit"] = lambda row: _share(row.get("limit_share"))
    columns["rel. error"] = lambda row: "-" if row["error"] is None else f"{row['error']:.1e}"
    lines = [[who, *(cell(row) for cell in columns.values())] for who, row in timed.items()]
    remark = results["cases"][name]["case"].get("remark")  # older results have none
    return Table(
        name,
        ["contender", *columns],
        lines,
        "\n".join([*([remark] if remark else []), *missing(rows)]),
    )


DECODING = ("decode", "step")


def milliseconds(value: float) -> str:
    """Three digits where there are three: 4,190, 52.4, 0.118."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def missing(rows: Mapping) -> Iterator[str]:
    """Who has no time, and why."""
    for who, row in rows.items():
        if "absent" in row:
            yield f"{who}: absent, {row['absent']}"
        elif "wrong" in row:
            yield f"{who}: wrong, {row['wrong']}"
        elif not row.get("covered", True):
            yield f"{who}: its time has launches in it, since it waits for the device itself"


def targets_table(results: Mapping) -> Table:
    """Each target beside what was measured, and whether it was reached."""
    lines = [
        [
            row["what"],
            "-" if row["value"] is None else f"{row['value']:.3g}{row['unit']}",
            row["target"],
            VERDICT[row["passes"]],
            row["source"],
        ]
        for row in results["checks"]
    ]
    return Table("Targets", ["what", "measured", "target", "", "asked for by"], lines)


def growth_table(results: Mapping) -> Table:
    """One line a case: exponents of time and memory, measured and declared."""
    by_case: dict[str, dict[str, dict]] = {}
    for row in results["growth"]:
        by_case.setdefault(row["case"], {})[row["of"]] = row
    lines = []
    for case, both in by_case.items():
        cells = [
            ("-" if row["measured"] is None else f"{row['measured']:.2f}", f"{row['declared']:g}")
            for row in (both["time"], both["memory"])
        ]
        passes = [row["passes"] for row in both.values()]
        verdict = "not judged" if None in passes else "ok" if all(passes) else "grows faster"
        lines.append([growth_name(results, case), *cells[0], *cells[1], verdict])
    note = (
        "Exponents in the length, by least squares over logarithms; more than 0.15 above the "
        "declared one fails."
    )
    return Table("Growth", ["", "time", "declared", "memory", "declared", ""], lines, note)


def growth_name(results: Mapping, case: str) -> str:
    """ "forward, sliding(window=512)"."""
    settings = results["cases"][case]["case"]
    return f"{settings['what']}, {settings['title'].removeprefix('growth ')}"


def peers_table(results: Mapping) -> Table:
    """Every peer, whether it is here, and whether it was raced."""
    lines = []
    for who, peer in results["peers"].items():
        rows = [
            row
            for measured in results["cases"].values()
            for name, row in measured["contenders"].items()
            if name.startswith(f"{who} ")
        ]
        timed = sum("ms_p50" in row for row in rows)
        elsewhere = _elsewhere(peer["rows"], results["settings"]["device"])
        said = f"raced in {timed} of {len(rows)} cases" if rows else elsewhere
        if peer["absent"] and said != "raced on GPUs":
            said = f"absent: {peer['absent']}" + ("" if rows else f"; {elsewhere}")
        lines.append([who, peer["version"] or "-", peer["against"], said])
    return Table("Peers", ["peer", "version", "raced with", ""], lines)


def _elsewhere(raced: Mapping[str, int], here: str) -> str:
    """Where a peer is raced that takes part in none of these cases."""
    if raced[here]:
        return "in none of these cases"
    return "raced on GPUs" if raced["cuda"] else "raced on CPUs" if raced["cpu"] else "no row yet"


def finding(results: Mapping) -> str:
    """One sentence: the headlines of the targets, and how many targets are met."""
    said = [row["headline"] for row in results["checks"] if row["headline"]]
    judged = [row["passes"] for row in results["checks"] if row["passes"] is not None]
    met = f"{sum(judged)} of {len(judged)} targets are met" if judged else "no target was measured"
    grown = [row for row in results["growth"] if row["passes"] is False]
    parts = [*said, met, *([f"{len(grown)} exponents exceed what is declared"] if grown else [])]
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def summary(results: Mapping) -> str:
    """One line of JSON."""
    checks = results["checks"]
    wrong = [
        f"{case}: {who}"
        for case, measured in results["cases"].items()
        for who, row in measured["contenders"].items()
        if "wrong" in row
    ]
    return json.dumps(
        {
            "cases": len(results["cases"]),
            "wrong": wrong,
            "targets_passed": sum(row["passes"] is True for row in checks),
            "falls_short": [row["what"] for row in checks if row["passes"] is False],
            "not_measured": [row["what"] for row in checks if row["passes"] is None],
            "faults": faults(results),
        }
    )
