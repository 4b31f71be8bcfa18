"""What `bench_attention` measured: tables, and the CPU's targets beside what was reached."""

from __future__ import annotations

import json

from effattn.profiling.bench_attention import BLOCK, GROWTH, LOOKING_BACK, WINDOW
from effattn.profiling.bench_contenders import Case, Contender
from effattn.profiling.html import Table

SDPA, FLEX, OURS = "sdpa dense", "flex window 512", "ours window 512"


def _forward(dtype: str, tokens: int, what: str = "forward") -> str:
    return Case(what, dtype, tokens, ()).name


# (what, case, the slower's name, the faster's, the least ratio of medians)
TARGETS = [
    ("window 512 against SDPA causal, T=16384", _forward("float32", 16384), SDPA, OURS, 10),
    ("window 512 against compiled flex, T=4096", _forward("float32", 4096), FLEX, OURS, 1),
    ("window 512 against compiled flex, T=16384", _forward("float32", 16384), FLEX, OURS, 1),
    ("window 512 against compiled flex, T=4096, bf16", _forward("bfloat16", 4096), FLEX, OURS, 2),
    ("window 512 against compiled flex, T=16384, bf16", _forward("bfloat16", 16384), FLEX, OURS, 2),
    ("training, window 512 against SDPA, T=16384", _forward("float32", 16384, "forward+backward"), SDPA, OURS, 6),
]  # fmt: skip
MOST_GROWTH = 4.6  # from 8192 to 32768 tokens: 4 is linear


def checks(results: dict) -> list[dict]:
    """The CPU's targets: {"what", "value", "target", "passes"}; value and passes are None where not measured."""
    found = []

    def median(case: str, contender: str) -> float | None:
        return results["cases"].get(case, {}).get("contenders", {}).get(contender, {}).get("ms_p50")

    def add(what: str, high: float | None, low: float | None, target: float, least: bool) -> None:
        value = high / low if high and low else None
        passes = None if value is None else value >= target if least else value <= target
        found.append({"what": what, "value": value, "target": f"{'>=' if least else '<='} {target}", "passes": passes})

    for what, case, slow, fast, target in TARGETS:
        add(what, median(case, slow), median(case, fast), target, True)
    growth = Case("forward", "float32", GROWTH[1], (), title="growth").name
    for pattern in (WINDOW, BLOCK, LOOKING_BACK):
        name, few, many = (Contender("ours", pattern, tokens).name for tokens in (None, *GROWTH))
        add(f"time, 32768 over 8192 tokens, {name}", median(growth, many), median(growth, few), MOST_GROWTH, False)
    for name, peaks in results.get("memory", {}).items():
        few, many = sorted(peaks, key=int)
        add(f"peak memory, {many} over {few} tokens, {name}", peaks[many], peaks[few], MOST_GROWTH, False)
    return found


def case_table(name: str, results: dict) -> Table:
    """Times in milliseconds, and how many times ours (the first of ours) each takes."""
    measured = results["cases"][name]
    rows = measured["contenders"]
    base = next((row["ms_p50"] for who, row in rows.items() if who.startswith("ours") and "ms_p50" in row), None)
    header = ["contender", "p20 ms", "p50 ms", "p80 ms", "over ours", "rel. error"]
    decode = measured["case"]["what"] == "decode"
    lines, missing = [], []
    for who, row in rows.items():
        if "ms_p50" not in row:
            missing.append(f"{who}: " + (f"absent, {row['absent']}" if "absent" in row else row["wrong"]))
            continue
        line = [who, *(f"{row[key]:,.2f}" for key in ("ms_p20", "ms_p50", "ms_p80"))]
        line += [f"{row['ms_p50'] / base:.2f}x" if base else "-", f"{row['error']:.1e}"]
        if decode:
            peak = results.get("read_bytes_per_s")
            line += [f"{row['gb_per_s']:,.0f}", f"{1e9 * row['gb_per_s'] / peak:.0%}" if peak else "-"]
        lines.append(line)
    return Table(name, header + ["KV GB/s", "of read"] * decode, lines, "\n".join(missing))


def checks_table(found: list[dict]) -> Table:
    verdict = {True: "pass", False: "falls short", None: "not measured"}
    lines = [
        [row["what"], "-" if row["value"] is None else f"{row['value']:.2f}x", row["target"], verdict[row["passes"]]]
        for row in found
    ]
    return Table("Targets", ["ratio of medians", "measured", "target", ""], lines)


def summary(results: dict) -> str:
    """One line of JSON."""
    found = checks(results) if results["settings"]["device"] == "cpu" else []
    wrong = [
        f"{case}: {who}"
        for case, measured in results["cases"].items()
        for who, row in measured["contenders"].items()
        if "wrong" in row
    ]
    short = [row["what"] for row in found if row["passes"] is False]
    passed = sum(row["passes"] is True for row in found)
    return json.dumps({"cases": len(results["cases"]), "wrong": wrong, "targets_passed": passed, "falls_short": short})
