"""The benchmark's tables and figures in the documentation, made of the files in `results/`.

Between `<!-- bench:FOLDER/BLOCK -->` and `<!-- /bench -->` of a page stands what `BLOCKS[BLOCK]`
makes of results/FOLDER/bench.json; figures go to docs/figures/FOLDER-BLOCK.svg. Doing it twice
changes nothing. `python -m bench.docs` does it for every page."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bench.page import plot_of_group
from bench.report import growth_table, milliseconds, missing, targets_table
from bench.results import read
from effattn.errors import check_choice
from effattn.reports.tables import Table, data_size, markdown_text

FIGURES = Path("docs") / "figures"
MARKER = re.compile(
    r"(<!-- bench:(?P<folder>[\w.-]+)/(?P<block>\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL
)
NOT_YET = "*Not measured yet: `make bench` writes `{file}`, `make pages` puts it here.*\n"
# A figure has no page around it to take its colours from.
STYLE = """<style>svg {--ink: #1f2328; --grid: #d0d7de; font-family: sans-serif}
@media (prefers-color-scheme: dark) {svg {--ink: #e6edf3; --grid: #3d444d}}</style>"""

FORWARD, TRAINING = "forward float32 B1 H8/8 D64", "forward+backward float32 B1 H8/8 D64"
BF16, STEP = "forward bfloat16 B1 H8/8 D64", "step float32 B4 H8/2 D64"
APPROXIMATE = "approximate backends"  # how the sources of their targets begin


def group_table(group: str) -> Callable[[Mapping], str]:
    """A line a length, a column a contender, median milliseconds; the fastest in bold; who is
    missing, below.
    """

    def block(results: Mapping) -> str:
        cases = [x for x in results["cases"].values() if x["case"]["group"] == group]
        if not cases:
            return f"*No case of {group} in these results.*"
        cases.sort(key=lambda case: case["case"]["tokens"])
        timed = [
            who for case in cases for who, row in case["contenders"].items() if "ms_p50" in row
        ]
        names = list(dict.fromkeys(timed))
        lines = []
        for case in cases:
            rows = case["contenders"]
            times = [rows.get(who, {}).get("ms_p50") for who in names]
            best = min(filter(None, times), default=None)
            cells = [
                "" if ms is None else f"**{milliseconds(ms)}**" if ms == best else milliseconds(ms)
                for ms in times
            ]
            lines.append([f"{case['case']['tokens']:,}", *cells])
        absent = dict.fromkeys(line for case in cases for line in missing(case["contenders"]))
        return plain_table(Table("", ["tokens", *names], lines)) + _notes(absent)

    return block


def steps_table(results: Mapping) -> str:
    """A decoding step at the longest cache: milliseconds, bytes held, bytes read a second and the
    share of the peak.
    """
    cases = [x for x in results["cases"].values() if x["case"]["group"] == STEP]
    if not cases:
        return f"*No case of {STEP} in these results.*"
    case = max(cases, key=lambda case: case["case"]["tokens"])
    lines = [
        [
            who,
            milliseconds(row["ms_p50"]),
            data_size(row["state_bytes"]),
            f"{row['read_gb_per_s']:.1f}",
            "" if row["read_share"] is None else f"{row['read_share']:.0%}",
        ]
        for who, row in case["contenders"].items()
        if "ms_p50" in row
    ]
    header = [
        f"after {case['case']['tokens']:,} tokens",
        "ms",
        "state",
        "read GB/s",
        "of the read peak",
    ]
    return plain_table(Table("", header, lines))


def targets_block(results: Mapping, source: str = "") -> str:
    """Every target, or those whose source begins so."""
    table = targets_table(
        {**results, "checks": [x for x in results["checks"] if x["source"].startswith(source)]}
    )
    return plain_table(Table("", ["", *table.header[1:4]], [row[:4] for row in table.rows]))


def growth_block(results: Mapping) -> str:
    """The table of growth with its note, in Markdown."""
    table = growth_table(results)
    return plain_table(table) + f"\n{markdown_text(table.note)}\n"


def figure(group: str) -> Callable[[Mapping], str]:
    """A plot as a standalone SVG that is legible on light and dark pages."""

    def block(results: Mapping) -> str:
        plots = plot_of_group(results, group, width=7.5, height=4.2)
        if not plots:
            return ""
        found = str(plots[0])
        drawn = found[found.index("<svg") : found.rindex("</svg>")] + "</svg>"
        head, _, rest = drawn.partition(">")
        return f"{head}>{STYLE}<!-- data: {digest(results, group)} -->{rest}\n"

    return block


def digest(results: Mapping, group: str) -> str:
    """Tells a figure of these numbers from one of others, whatever version of matplotlib drew
    it.
    """
    cases = {
        name: case["contenders"]
        for name, case in results["cases"].items()
        if case["case"]["group"] == group
    }
    return hashlib.sha256(json.dumps(cases, sort_keys=True).encode()).hexdigest()[:16]


BLOCKS: dict[str, Callable[[Mapping], str]] = {
    "forward": group_table(FORWARD),
    "bf16": group_table(BF16),
    "training": group_table(TRAINING),
    "steps": steps_table,
    "growth": growth_block,
    "targets": targets_block,
    "approximate": partial(targets_block, source=APPROXIMATE),
    "packed": partial(targets_block, source="packed caches"),
    "rerope": partial(targets_block, source="ReRoPE"),
}
DRAWN = {"figure": FORWARD, "training_figure": TRAINING}


def update(text: str, root: Path) -> tuple[str, dict[Path, str]]:
    """The `text` of a page in docs/ with its blocks made new, and its figures {path: SVG}, from
    the results below `root`.

    ValueError for unknown blocks, markers without an end, and results that cannot be read.
    """
    if text.count("<!-- bench:") != len(MARKER.findall(text)):
        raise ValueError("docs: a marker is not <!-- bench:FOLDER/BLOCK --> … <!-- /bench -->")
    figures: dict[Path, str] = {}

    def fill(found: re.Match) -> str:
        folder, block = found["folder"], found["block"]
        check_choice("docs: block", block, [*BLOCKS, *DRAWN])
        file = Path("results") / folder / "bench.json"
        if not (root / file).is_file():
            return found[1] + NOT_YET.format(file=file.as_posix()) + found[4]
        results = read(root / file)
        if block in BLOCKS:
            return f"{found[1]}{BLOCKS[block](results)}\n{caption(results, file)}\n{found[4]}"
        path = FIGURES / f"{folder}-{block}.svg"
        figures[path] = figure(DRAWN[block])(results)
        link = f"![{DRAWN[block]}]({path.relative_to('docs').as_posix()})"
        return f"{found[1]}{link}\n\n{caption(results, file)}\n{found[4]}"

    return MARKER.sub(fill, text), figures


def caption(results: Mapping, file: Path) -> str:
    """Where and when: every block ends with it."""
    where = results["environment"]
    on = (
        f"{where['device']}, {where['threads']} threads"
        if results["settings"]["device"] == "cpu"
        else where["device"]
    )
    said = (
        " (a quick run: shows that it works, not how fast)" if results["settings"]["quick"] else ""
    )
    return (
        f"<sub>{on}; torch {where['torch']}; {where['date'][:10]}{said}; `{file.as_posix()}`</sub>"
    )


def plain_table(table: Table) -> str:
    """A table in Markdown, without its title."""
    return table.markdown().partition("\n\n")[2].partition("\n\n")[0] + "\n"


def _notes(lines: Mapping) -> str:
    return "".join(f"\n{markdown_text(line)}  " for line in lines) + ("\n" if lines else "")
