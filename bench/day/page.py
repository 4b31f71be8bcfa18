"""A day's headlines in the documentation: between `<!-- day:FOLDER -->` and `<!-- /day -->` stands
what results/FOLDER/gpu_day/ says, beside what was predicted. Without results it says so."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from bench.day.summary import headlines_table
from effattn.reports.tables import markdown_text

MARKER = re.compile(r"(<!-- day:(?P<folder>[\w.-]+) -->\n).*?(<!-- /day -->)", re.DOTALL)
NOT_YET = (
    "*Not measured yet: `make gpu-day` on such a GPU writes `{folder}`, `make pages` puts it here.*"
)
MEASURED = "<sub>{gpu}; torch {torch}, triton {triton}; {date}; `{folder}`</sub>"


def update(text: str, root: Path) -> str:
    """The `text` of a page in docs/ with its blocks made new, from the results below `root`.
    ValueError for a marker without an end, and results that cannot be read."""
    if text.count("<!-- day:") != len(MARKER.findall(text)):
        raise ValueError("docs: a marker is not <!-- day:FOLDER --> … <!-- /day -->")

    def fill(found: re.Match) -> str:
        folder = Path("results") / found["folder"] / "gpu_day"
        steps = {name: _read(root / folder / f"{name}.json") for name in ("versions", "headlines")}
        table = headlines_table({name: step for name, step in steps.items() if step})
        said = caption(steps["versions"], folder) if steps["headlines"] else NOT_YET
        parts = [table.markdown().partition("\n\n")[2].partition("\n\n")[0]]
        parts += [markdown_text(table.note), said.format(folder=folder.as_posix())]
        return found[1] + "\n\n".join(parts) + "\n" + found[3]

    return MARKER.sub(fill, text)


def _read(file: Path) -> dict | None:
    """What a step's file holds; None where there is none. ValueError for what is not JSON."""
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def caption(versions: Mapping | None, folder: Path) -> str:
    """Where and when it was measured."""
    rows = versions["jobs"]["versions"]["results"] if versions else []
    where = next((row["environment"] for row in rows if "environment" in row), {})
    return MEASURED.format(
        gpu=where.get("device", folder.parent.name),
        torch=where.get("torch", "unknown"),
        triton=where.get("triton", "unknown"),
        date=where.get("date", "unknown")[:10],
        folder=folder.as_posix(),
    )
