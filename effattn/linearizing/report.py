"""The report of a linearization: quality before and after each stage, and what decoding remembers.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

from effattn.linearizing.approximation_report import ApproximationReport
from effattn.reports.common import (
    QUALITY_HEADER,
    QUALITY_NAMES,
    about,
    curve_table,
    measured_on,
)
from effattn.reports.document import Document
from effattn.reports.page import Section, page
from effattn.reports.plots import AFTER, BEFORE, UPTRAINED, Series, bar_plot, line_plot, short_count
from effattn.reports.tables import Table, data_size, number, pairs, percent
from effattn.swapping.patterns import label_of

STAGES = ("swap", "transfer", "distillation")
QUALITY, STATE = "Quality", "What decoding remembers"
ERRORS = "Error against exact attention before training"


class Transfer(TypedDict):
    """What attention transfer did: each layer's squared distance from the parent's attention
    output, over that one's square."""

    tokens: int  # seen
    before: list[float]
    after: list[float]


class StateBytes(TypedDict):
    """What decoding remembers of one sequence, all layers, in bytes."""

    context: int  # tokens
    plain: int  # of a K/V cache
    ours: int


@dataclass
class LinearizeReport(Document):
    """Wraps `data`, a dict of kind "linearize": settings, model, layers, quality (the parent, and
    what was measured on), stages (perplexity, cross_entropy, kl after each), transfer,
    distillation, approximation (see there), state_bytes, verification, environment. Perplexities
    come with their cross-entropy in nats a token."""

    data: dict
    kind = "linearize"
    named = "a linearization's report"
    terminal = (QUALITY, STATE)

    @property
    def label(self) -> str:
        """What was done, as the report writes it."""
        settings = self.data["settings"]
        parts = []
        if settings["pattern"]:
            kept = (
                f", every {settings['keep_every']}th layer {settings['keep']}"
                if settings["keep_every"]
                else ""
            )
            parts.append(label_of(settings["pattern"]) + kept)
        return " and ".join(
            [*parts, *([settings["projections"]] if settings["projections"] else [])]
        )

    @property
    def title(self) -> str:
        return f"{self.data['settings']['model']}: {self.label}"

    @property
    def tokens(self) -> int:
        """Tokens that both trainings saw."""
        return sum(
            (self.data[stage] or {}).get("tokens", 0) for stage in ("transfer", "distillation")
        )

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        parent = self.data["quality"]["before"]["perplexity"]
        last = [stage for stage in STAGES if stage in self.data["stages"]][-1]
        now, first = (
            self.data["stages"][last]["perplexity"],
            self.data["stages"]["swap"]["perplexity"],
        )
        text = f"{self.label}: perplexity {parent:.2f} -> {now:.2f} ({now / parent:.2f}x)"
        if last != "swap":
            text += f" after {self.tokens:,} tokens of training ({first:,.1f} right after the swap)"
        row = self.data["state_bytes"][-1]
        if row["ours"] < row["plain"]:
            text += (
                f"; at {short_count(row['context'])} tokens decoding remembers "
                f"{data_size(row['ours'])} "
            )
            text += (
                f"instead of {data_size(row['plain'])} ({row['plain'] / row['ours']:,.0f}x less)"
            )
        before, after = (self.data["model"][f"parameters_{when}"] for when in ("before", "after"))
        if after < before:
            text += f"; {after:,} parameters instead of {before:,}"
        return text + "."

    def tables(self) -> list[Table]:
        """Every table, the headline's first."""
        data = self.data
        tables = [self._quality(), self._states()]
        if moved := data["transfer"]:
            tables.append(_transfer(moved))
        if learned := data["distillation"]:
            note = "On the first 8,192 held-out tokens."
            tables.append(curve_table("Distillation", "Tokens", learned["curve"], note))
        if data.get("approximation"):
            for table in ApproximationReport(data["approximation"]).tables():
                tables.append(replace(table, title=f"{ERRORS}: {table.title}", folded=True))
        rows = [[str(row["layer"]), row["pattern"], row["projections"]] for row in data["layers"]]
        tables.append(Table("Layers", ("Layer", "Pattern", "Projections"), rows, folded=True))
        if data["verification"]:
            tables.append(pairs("Checkpoint, loaded again", data["verification"]))
        return [*tables, *about(data)]

    def _quality(self) -> Table:
        """The parent, and the model after each stage."""
        data, parent = self.data, self.data["quality"]["before"]
        perplexity, cross_entropy = (f"{parent[name]:.4f}" for name in QUALITY_NAMES[:2])
        rows = [["the parent", perplexity, cross_entropy, "-", "-"]]
        for stage in STAGES:
            if stage in data["stages"]:
                found = data["stages"][stage]
                trained = (data.get(stage) or {}).get("tokens")
                change = percent(parent["perplexity"], found["perplexity"])
                rows.append(
                    [
                        f"after {stage}",
                        number(found["perplexity"]) + change,
                        number(found["cross_entropy"]),
                        number(found["kl"]),
                        number(trained) if trained else "-",
                    ]
                )
        note = measured_on(data["quality"])
        share = data["pretraining_tokens"] and self.tokens / data["pretraining_tokens"]
        note += f" Training saw {100 * share:.2f} % of the pretraining tokens." if share else ""
        return Table(QUALITY, ("", *QUALITY_HEADER, "Trained on (tokens)"), rows, note)

    def _states(self) -> Table:
        sizes: list[StateBytes] = self.data["state_bytes"]
        rows = [
            [
                f"{row['context']:,}",
                data_size(row["plain"]),
                data_size(row["ours"]),
                f"{row['plain'] / row['ours']:,.2f}x",
            ]
            for row in sizes
        ]
        header = ("Context (tokens)", "K/V cache", "Now", "Smaller by")
        return Table(STATE, header, rows, "Bytes of one sequence, all layers, as declared.")

    def plots(self) -> dict[str, list]:
        """Section -> its figures."""
        data, parent = self.data, self.data["quality"]["before"]["perplexity"]
        stages = [stage for stage in STAGES if stage in data["stages"]]
        values = [parent, *(data["stages"][stage]["perplexity"] for stage in stages)]
        found = {
            QUALITY: [
                bar_plot(
                    "Perplexity by stage",
                    ["parent", *stages],
                    [("perplexity", AFTER, values)],
                    "",
                    "perplexity",
                )
            ]
        }
        if data["distillation"] and data["distillation"]["curve"]:
            points = data["distillation"]["curve"]
            x = [point["tokens"] / 1000 for point in points]
            lines = [Series("now", x, [point["perplexity"] for point in points], AFTER)]
            level = (data["distillation"]["parent"] or {}).get("perplexity")
            if level:
                lines.append(
                    Series("the parent", x, [level] * len(x), BEFORE, style="--", marker="")
                )
            found[QUALITY].append(
                line_plot("Distillation", lines, "thousand tokens", "perplexity", log_y=True)
            )
        contexts = [row["context"] for row in data["state_bytes"]]
        lines = [
            Series(
                "K/V cache", contexts, [row["plain"] / 2**20 for row in data["state_bytes"]], BEFORE
            ),
            Series("now", contexts, [row["ours"] / 2**20 for row in data["state_bytes"]], AFTER),
        ]
        found[STATE] = [
            line_plot(
                "State of one sequence", lines, "context (tokens)", "MiB", contexts=True, log_y=True
            )
        ]
        if moved := data["transfer"]:
            series = [("before", BEFORE, moved["before"]), ("after", UPTRAINED, moved["after"])]
            layers = [str(index) for index in range(len(moved["before"]))]
            found["Attention transfer"] = [
                bar_plot("Distance of attention outputs", layers, series, "layer", "relative")
            ]
        return found

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        tables, plots = {table.title: table for table in self.tables()}, self.plots()
        facts = ("Checkpoint, loaded again", "Settings", "Model", "Environment")
        sections = [
            Section(title, "", plots.get(title, []), [table])
            for title, table in tables.items()
            if title not in facts and title != "Distillation"
        ]
        sections[0].tables += [tables[name] for name in ("Distillation",) if name in tables]
        sections += [Section(name, tables=[tables[name]]) for name in facts if name in tables]
        return page(self.title, self.headline, sections)


def _transfer(moved: Transfer) -> Table:
    rows = [
        [str(i), number(a), number(b)]
        for i, (a, b) in enumerate(zip(moved["before"], moved["after"], strict=True))
    ]
    note = (
        "Squared distance of each layer's attention output from the parent's over the parent's "
        "square."
    )
    return Table("Attention transfer", ("Layer", "Before", "After"), rows, note, folded=True)
