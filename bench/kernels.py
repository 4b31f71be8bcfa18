"""The kernels' predicted share of their limits: compiled for a GPU that is not here, and the table
of `docs/kernels.md` that `make pages` makes of it.

python -m bench.kernels     # compiles and writes results/h200-predicted/kernels.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from effattn.reports.files import write_text_atomic
from effattn.reports.tables import markdown_text

ROOT = Path(__file__).parents[1]
PREDICTED = Path("results/h200-predicted/kernels.json")
MEASURED = Path("results/h200/kernels.json")  # {"measured": {"FOLDER NAME": share of the limit}}
MARKER = re.compile(r"(<!-- kernels:predicted -->\n).*?(<!-- /kernels -->)", re.DOTALL)
HEADLINES = (
    "decode full d128 bf16 g4",
    "decode packed int8 d128 g4",
    "decode packed fp8 d128 g4",
    "decode packed int4 d128 g4",
    "decode packed int2 d128 g4",
    "flash forward_64_bf16_full",
    "flash forward_128_bf16_full",
    "flash backward_queries_128_bf16_full",
    "flash backward_keys_128_bf16_full",
    "linear chunk_sums_128_bf16_elu",
    "linear scan_bf16",
    "linear forward_128_bf16_elu",
    "monarch both 4096 b32 r4 bf16",
    "sparse24 product bf16 of 1",
    "sparse24 product bf16 of 16",
    "bitmask product bf16 of 1",
    "ragged ragged d128 bf16 g4 q1",
    "topk forward_128_bf16",
    "gated forward_128_bf16_head",
    "latent keys d128 bf16",
    "bandwidth copy",
)
HEADINGS = (
    *("kernel", "registers", "blocks", "instructions", "bytes", "matrix unit"),
    *("predicted", "bound by", "measured"),
)


def make(root: Path = ROOT) -> None:
    """Compiles every variant for sm_90 and writes what is predicted of the headlines, and which
    marks hold."""
    import triton

    from effattn.kernels import marks, report

    reports = report.report_all(["sm_90"])
    named = {f"{each.result.folder} {each.result.name}": each for each in reports}
    found = [named[name] for name in HEADLINES]
    where = dict(
        device="no GPU: machine code for sm_90",
        threads=1,
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    plain = {
        "environment": where,
        "kernels": [each.to_dict() for each in found],
        "marks": [vars(each) for each in marks.marks(reports)],
    }
    write_text_atomic(root / PREDICTED, json.dumps(plain, indent=1) + "\n")


def update(text: str, root: Path = ROOT) -> str:
    """A page with its table made new; other pages as they are. ValueError for a marker without an
    end."""
    if "<!-- kernels:" not in text:
        return text
    if not MARKER.search(text):
        raise ValueError("docs: a marker is not <!-- kernels:predicted --> … <!-- /kernels -->")
    return MARKER.sub(lambda found: found[1] + table(root) + found[2], text)


def table(root: Path = ROOT) -> str:
    """In Markdown, measurements beside predictions; empty where there is none."""
    predicted = json.loads((root / PREDICTED).read_text(encoding="utf-8"))
    measured = {}
    if (root / MEASURED).is_file():
        measured = json.loads((root / MEASURED).read_text(encoding="utf-8"))["measured"]
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    lines += [_row(each, measured) for each in predicted["kernels"]]
    shown = "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
    where = predicted["environment"]
    made = f"Predicted by triton {where['triton']}'s machine code for sm_90, {where['date'][:10]}."
    return f"{shown}\n\n{_marks(predicted.get('marks', []))}{made}\n"


def _marks(found: list[Mapping]) -> str:
    """What the kernels are to reach in the model, and which do."""
    if not found:
        return ""
    lines = [
        ("mark in the model", "at least", "predicted", "holds"),
        ("---", "---:", "---:", "---"),
    ]
    for each in found:
        least = f"{each['least']:.2f}" if each["least"] else "0"
        got = f"{each['got']:.2f}" if each["least"] else f"{each['got']:.0f}"
        lines.append((each["what"], least, got, "yes" if each["holds"] else "no"))
    return "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines) + "\n\n"


def _row(each: Mapping, measured: Mapping[str, float]) -> list[str]:
    name = f"{each['folder']} {each['name']}"
    loop = each["main"] or {}
    share, got = loop.get("fraction"), measured.get(name)
    cells = [name, each["registers"], each["blocks"], loop.get("instructions"), loop.get("bytes")]
    cells += [loop.get("matrix"), None if share is None else f"{share:.0%} of {loop['limit']}"]
    shown = ["?" if cell is None else str(cell) for cell in cells]
    return [*shown, loop.get("bound_by") or "?", "" if got is None else f"{got:.0%}"]


if __name__ == "__main__":
    make()
