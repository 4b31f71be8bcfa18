"""The report of a swap: perplexity by context, along a stream, the cache's bytes, and generated
text.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from effattn.reports.common import HARNESS
from effattn.reports.page import Section, markdown_text, page
from effattn.reports.tables import Table, data_size
from effattn.swapping import report_plots as plots
from effattn.swapping import report_tables as tables
from effattn.swapping.report_data import SwapData, number, past

STAYS = 1.5  # times the reference on the same tokens, at most: the perplexity of a stream "stays"


@dataclass
class SwapReport(SwapData):
    """A swap's data as tables, plots, passages and a page."""

    @property
    def title(self) -> str:
        return f"{self.settings['model']}: {self.main['label']}"

    @property
    def headline(self) -> str:
        """The result in one sentence: what a long stream does to the pattern, and to the model as
        it was.
        """
        main, reference = self.main["stream"], self.reference
        ours, best = (past(one, self.trained) for one in (main, reference))
        found = number(ours["perplexity"])
        kind = "is at" if ours["first"] == 0 else "stays at" if _stays(ours, best) else "rises to"
        text = (
            f"Streaming {main['tokens']:,} tokens: {self.main['label']} {kind} perplexity {found}"
        )
        text += f" past token {ours['first']:,}" if ours["first"] else ""
        compared = f"the unchanged model in fresh windows of {reference['context']:,}"
        text += f" ({number(best['perplexity'])} for {compared})"
        parted = [text + f" and holds {data_size(main['cache_bytes'][-1][1])} of cache"]
        for run in self.runs:
            last, held = (
                run["stream"]["buckets"][-1],
                data_size(run["stream"]["cache_bytes"][-1][1]),
            )
            if run["role"] == "before":
                end = f"{number(last['perplexity'])} by token {last['last']:,}, holding {held}"
                parted.append(f"{run['label']} is at {end}")
            elif run["role"] == "baseline":
                found = past(run["stream"], self.trained)["perplexity"]
                parted.append(f"{run['label']}, without sinks, is at {number(found)}")
        return "; ".join(parted) + "."

    def shown(self) -> list[Table]:
        found = tables.tables(self)
        return [one for one in found if not one.folded and one.title in tables.TERMINAL]

    def table(self):
        """What a person wants on the terminal: the finding, both tables, and the text past the
        trained length.
        """
        from rich.console import Group
        from rich.text import Text

        lines = [
            Text(self.title, style="bold"),
            Text(self.headline),
            *(part for one in self.shown() for part in ("", one.rich())),
        ]
        for passage in tables.passages(self, given=0):
            lines += [
                "",
                Text(
                    f"{passage.title}: {passage.border}" if passage.rest else passage.title,
                    style="bold",
                ),
            ]
            lines.append(Text(tables.shortened(passage.rest or passage.text)))
        return Group(*lines)

    def to_markdown(self) -> str:
        blocks = [f"# {markdown_text(self.title)}", markdown_text(self.headline)]
        blocks += [table.markdown() for table in tables.tables(self)]
        blocks += [passage.markdown() for passage in tables.passages(self)]
        return "\n\n".join(blocks) + "\n"

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        shown = {table.title: table for table in tables.tables(self)}

        def section(title: str, plots: list, *names: str, note: str = "", passages=()) -> Section:
            return Section(
                title, note, plots, [shown[name] for name in names if name in shown], list(passages)
            )

        passages = tables.passages(self)
        sections = [
            section(
                "One long stream",
                plots.along_stream(self),
                tables.STREAM,
                "Along the stream",
                "Seconds",
                note=tables.stream_note(self),
            ),
            section(
                "Perplexity by context",
                plots.by_context(self),
                tables.CONTEXTS,
                note=tables.context_note(self),
            ),
            section("Generated text", [], passages=passages, note=tables.text_note(self)),
            section("Checkpoint", [], "Checkpoint"),
            section(HARNESS, [], HARNESS),
            section("Settings", [], "Settings", "Model", "Patterns by layer"),
            section("Environment", [], "Environment"),
        ]
        return page(self.title, self.headline, sections)


def _stays(ours: dict, best: dict) -> bool:
    return ours["perplexity"] <= STAYS * best["perplexity"]
