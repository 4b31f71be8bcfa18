"""Plots of committed reports in the documentation.

Between `<!-- plot:FOLDER/NAME/PLACE -->` and `<!-- /plot -->` of a page stands the plot with that
number of what `PLOTS[NAME]` draws of results/FOLDER/NAME.json, as FOLDER-NAME-PLACE.svg in
docs/figures. `python -m bench.docs` does it for every page."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from bench.pages import FIGURES, STYLE
from effattn.errors import check_choice
from effattn.extending import tuned_report

MARKER = re.compile(
    r"(<!-- plot:(?P<folder>[\w.-]+)/(?P<name>\w+)/(?P<place>\d+) -->\n).*?(?P<end><!-- /plot -->)",
    re.DOTALL,
)
PLOTS: dict[str, Callable[[Mapping], Sequence[Markup]]] = {
    "extend_context_tuned": lambda found: tuned_report.plots(found["tuned"])[tuned_report.CURVES],
}


def update(text: str, root: Path, page: Path) -> tuple[str, dict[Path, str]]:
    """The `text` of a page (its path below `root`) with its plots made new, and their files {path:
    SVG}. ValueError for unknown reports and markers without an end."""
    if text.count("<!-- plot:") != len(MARKER.findall(text)):
        raise ValueError("docs: a marker is not <!-- plot:FOLDER/NAME/PLACE --> … <!-- /plot -->")
    figures: dict[Path, str] = {}

    def fill(found: re.Match) -> str:
        folder, name, place = found["folder"], found["name"], int(found["place"])
        check_choice("docs: plot", name, PLOTS)
        data = json.loads((root / "results" / folder / f"{name}.json").read_text(encoding="utf-8"))
        drawn = str(PLOTS[name](data)[place])
        path = FIGURES / f"{folder}-{name}-{place}.svg"
        figures[path] = standalone(drawn, data)
        title = re.search(r'aria-label="([^"]*)"', drawn)
        link = os.path.relpath(path, page.parent)
        return f"{found[1]}![{title[1] if title else name}]({link})\n{found['end']}"

    return MARKER.sub(fill, text), figures


def standalone(drawn: str, data: Mapping) -> str:
    """A plot as a file that is legible on light and dark pages, with a digest of its numbers."""
    svg = drawn[drawn.index("<svg") : drawn.rindex("</svg>")] + "</svg>"
    head, _, rest = svg.partition(">")
    tuned = json.dumps(data["tuned"], sort_keys=True).encode()
    return f"{head}>{STYLE}<!-- data: {hashlib.sha256(tuned).hexdigest()[:16]} -->{rest}\n"
