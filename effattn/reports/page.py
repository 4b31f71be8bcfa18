"""The report page: one HTML file of sections with plots, tables and passages, complete by
itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from effattn.reports.tables import Table, markdown_text

__all__ = ["Passage", "Section", "markdown_text", "page", "render"]

TEMPLATES = Path(__file__).with_name("templates")


@dataclass
class Passage:
    """Text to read: `given` (a prompt), what follows it, and, behind a line that says `border`, the
    rest.
    """

    title: str
    given: str
    text: str
    border: str = ""
    rest: str = ""

    def markdown(self) -> str:
        """The passage as a block of code, its border marked."""
        body = (
            self.given
            + self.text
            + (f"\n----- {self.border} -----\n{self.rest}" if self.rest else "")
        )
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
        return f"**{markdown_text(self.title)}**\n\n{fence}text\n{body}\n{fence}"


@dataclass
class Section:
    """A heading with its plots, tables and passages."""

    title: str
    note: str = ""
    plots: list[Markup] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)


def render(template: str, **values: object) -> str:
    """The template of that name in `templates/`, with autoescape on; a missing value is an
    error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment.get_template(template).render(**values)


def _code(text: object) -> Markup:
    """Text of a report, in which words between backticks are code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole HTML page, `lead` (the finding, one sentence) on top; empty sections are left out.

    It makes no request to anywhere: its policy forbids that, and any script but its own (which
    sorts tables and turns the page light or dark; without it the page is complete)."""
    shown = [s for s in sections if s.plots or s.tables or s.passages]
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        "page.html.jinja",
        title=title,
        lead=lead,
        sections=shown,
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
    )
