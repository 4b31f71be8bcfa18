"""The report of a swap: perplexity by context, along a stream, the cache's bytes, and generated
text.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from effattn.reports.document import Document
from effattn.reports.page import Section, markdown_text, page
from effattn.reports.tables import data_size
from effattn.swapping import report_parts as parts

STAYS = 1.5  # times the reference on the same tokens, at most: the perplexity of a stream "stays"


@dataclass
class SwapReport(Document):
    """Wraps `data`, a dict of kind "swap_backend".

    Keys: settings, model, runs (before, the patterns, baselines: each with contexts, stream and
    text), reference (the same stream in fresh windows), prompt, verification (null without an
    output), environment. Perplexities come with their cross-entropy in nats a token; cache_bytes
    are pairs (tokens, bytes)."""

    data: dict

    def __post_init__(self):
        if self.data.get("kind") != "swap_backend":
            raise ValueError(
                f"kind: got {self.data.get('kind')!r}, a swap report has 'swap_backend'"
            )

    @property
    def settings(self) -> dict:
        """What was asked for."""
        return self.data["settings"]

    @property
    def runs(self) -> list[dict]:
        """What was measured of each pattern."""
        return self.data["runs"]

    @property
    def trained(self) -> int | None:
        """The model's trained length, in tokens."""
        return self.data["model"]["trained_length"]

    @property
    def main(self) -> dict:
        """The run of the first pattern: the one that the report is about, and that is saved."""
        return next(run for run in self.runs if run["role"] == "pattern")

    @property
    def title(self) -> str:
        return f"{self.settings['model']}: {self.main['label']}"

    @property
    def headline(self) -> str:
        """The result in one sentence: what a long stream does to the pattern, and to the model as
        it was.
        """
        main, reference = self.main["stream"], self.data["reference"]
        ours, best = (parts.past(one, self.trained) for one in (main, reference))
        found = parts.number(ours["perplexity"])
        kind = "is at" if ours["first"] == 0 else "stays at" if _stays(ours, best) else "rises to"
        text = (
            f"Streaming {main['tokens']:,} tokens: {self.main['label']} {kind} perplexity {found}"
        )
        text += f" past token {ours['first']:,}" if ours["first"] else ""
        compared = f"the unchanged model in fresh windows of {reference['context']:,}"
        text += f" ({parts.number(best['perplexity'])} for {compared})"
        parted = [text + f" and holds {data_size(main['cache_bytes'][-1][1])} of cache"]
        for run in self.runs:
            last, held = (
                run["stream"]["buckets"][-1],
                data_size(run["stream"]["cache_bytes"][-1][1]),
            )
            if run["role"] == "before":
                end = (
                    f"{parts.number(last['perplexity'])} by token {last['last']:,}, holding {held}"
                )
                parted.append(f"{run['label']} is at {end}")
            elif run["role"] == "baseline":
                found = parts.past(run["stream"], self.trained)["perplexity"]
                parted.append(f"{run['label']}, without sinks, is at {parts.number(found)}")
        return "; ".join(parted) + "."

    def table(self):
        """What a person wants on the terminal: the finding, both tables, and the text past the
        trained length.
        """
        from rich.console import Group
        from rich.text import Text

        shown = [
            table.rich()
            for table in parts.tables(self)
            if not table.folded and table.title in parts.TERMINAL
        ]
        lines = [
            Text(self.title, style="bold"),
            Text(self.headline),
            *(part for one in shown for part in ("", one)),
        ]
        for passage in parts.passages(self, given=0):
            lines += [
                "",
                Text(
                    f"{passage.title}: {passage.border}" if passage.rest else passage.title,
                    style="bold",
                ),
            ]
            lines.append(Text(parts.shortened(passage.rest or passage.text)))
        return Group(*lines)

    def to_markdown(self) -> str:
        blocks = [f"# {markdown_text(self.title)}", markdown_text(self.headline)]
        blocks += [table.markdown() for table in parts.tables(self)]
        blocks += [passage.markdown() for passage in parts.passages(self)]
        return "\n\n".join(blocks) + "\n"

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        shown = {table.title: table for table in parts.tables(self)}

        def section(title: str, plots: list, *names: str, note: str = "", passages=()) -> Section:
            return Section(
                title, note, plots, [shown[name] for name in names if name in shown], list(passages)
            )

        passages = parts.passages(self)
        sections = [
            section(
                "One long stream",
                parts.along_stream(self),
                parts.STREAM,
                "Along the stream",
                "Seconds",
                note=parts.stream_note(self),
            ),
            section(
                "Perplexity by context",
                parts.by_context(self),
                parts.CONTEXTS,
                note=parts.context_note(self),
            ),
            section("Generated text", [], passages=passages, note=parts.text_note(self)),
            section("Checkpoint", [], "Checkpoint"),
            section("Settings", [], "Settings", "Model", "Patterns by layer"),
            section("Environment", [], "Environment"),
        ]
        return page(self.title, self.headline, sections)


def _stays(ours: dict, best: dict) -> bool:
    return ours["perplexity"] <= STAYS * best["perplexity"]
