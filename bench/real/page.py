"""The tables of docs/real-models.md, made of results/<device>/real/*.json.

Between `<!-- real:FOLDER/SUBJECT -->` and `<!-- /real -->` stands the table of a subject, or for
SUBJECT `targets` that of all targets. `python -m bench.docs` does it for every page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from bench.pages import plain_table
from bench.real.steps import Subject, Target, subjects
from effattn.errors import check_choice
from effattn.reports.tables import Table, markdown_text

MARKER = re.compile(
    r"(<!-- real:(?P<folder>[\w.-]+)/(?P<block>\w+) -->\n).*?(<!-- /real -->)", re.DOTALL
)
TARGETS = "targets"
TOOK = ["tokens read", "CPU s", "wall s", "peak MiB"]


def update(text: str, root: Path) -> str:
    """The `text` of a page with its blocks made new from the results below `root`. ValueError for
    unknown blocks and markers without an end."""
    if text.count("<!-- real:") != len(MARKER.findall(text)):
        raise ValueError("docs: a marker is not <!-- real:FOLDER/SUBJECT --> … <!-- /real -->")
    known = subjects()

    def fill(found: re.Match) -> str:
        block, folder = found["block"], Path("results") / found["folder"] / "real"
        check_choice("docs: block", block, [*known, TARGETS])
        if block == TARGETS:
            return f"{found[1]}{targets_block(known, root / folder)}{found[4]}"
        file = folder / f"{block}.json"
        return f"{found[1]}{block_of(known[block], root, file)}{found[4]}"

    return MARKER.sub(fill, text)


def steps_in(file: Path) -> dict[str, dict]:
    """The rows of a file of results, by their steps; none where there is no file."""
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))["steps"]


def block_of(subject: Subject, root: Path, file: Path) -> str:
    """The table of a subject, what it was made with, and what was not measured."""
    rows = steps_in(root / file)
    measured = [step.name for step in subject.steps if step.name in rows]
    missing = [f"`{step.name}`" for step in subject.steps if step.name not in rows]
    parts = []
    if measured:
        lines = [line(subject, name, rows[name]) for name in measured]
        parts.append(plain_table(Table("", ["", *subject.columns, *TOOK], lines)))
    if subject.note:
        parts.append(f"{subject.note}\n")
    if missing:
        parts.append(f"*Not measured yet (`make real`): {', '.join(missing)}.*\n")
    if measured:
        parts.append(caption({name: rows[name] for name in measured}, file))
    return "\n".join(parts)


def line(subject: Subject, name: str, row: Mapping) -> list[str]:
    """A step's cells."""
    read = [value for key, value in row["settings"].items() if key.endswith("tokens")]
    return [
        markdown_text(name),
        *(cell(row["found"]) for cell in subject.columns.values()),
        " + ".join(f"{count:,}" for count in read),
        f"{row['cpu_seconds']:,.0f}",
        f"{row['wall_seconds']:,.0f}",
        f"{row['peak_bytes'] / 2**20:,.0f}",
    ]


def caption(rows: Mapping[str, Mapping], file: Path) -> str:
    """On which model, text and machine the steps were measured: a line, or one for each kind that
    names its steps, where they differ."""
    made: dict[str, list[str]] = {}
    for name, row in rows.items():
        where, read = row["environment"], row["read"]
        said = (
            f"{read['model']} (weights {read['model_digest'][:8]}, text {read['text'][:8]}); "
            f"{where['device']}, threads: {where['threads']}; torch {where['torch']}, transformers "
            f"{where['transformers']}; {where['date'][:10]}"
        )
        made.setdefault(said, []).append(name)
    lines = [
        f"{said}: {', '.join(names)}" if len(made) > 1 else said for said, names in made.items()
    ]
    return f"<sub>{'<br>'.join(lines)}; `{file.as_posix()}`</sub>\n"


def targets_block(known: Mapping[str, Subject], folder: Path) -> str:
    """All targets: what was to be reached, and whether it was."""
    lines = []
    for name, subject in known.items():
        found = {step: row["found"] for step, row in steps_in(folder / f"{name}.json").items()}
        lines += [judged(target, found) for target in subject.targets]
    return plain_table(Table("", ["", "at most", "measured", "reached"], lines))


def judged(target: Target, found: Mapping[str, dict]) -> list[str]:
    """A target's cells."""
    value = target.value(found)
    if value is None:
        return [target.what, f"{target.most:g}", "not yet", ""]
    reached = "yes" if value <= target.most else "no"
    return [target.what, f"{target.most:g}", f"{value:.3g}", reached]
