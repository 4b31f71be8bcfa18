"""The report of a linearization: quality before and after each stage, and what decoding remembers.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from effattn.linearizing.approximation_report import ApproximationReport
from effattn.reports.document import Document
from effattn.reports.page import Section, page
from effattn.reports.plots import AFTER, BEFORE, UPTRAINED, Series, bar_plot, line_plot, short_count
from effattn.reports.tables import Table, data_size, number, pairs, percent
from effattn.swapping.patterns import label_of

STAGES = ("swap", "transfer", "distillation")
QUALITY, STATE = "Quality", "What decoding remembers"
ERRORS = "Error against exact attention before training"


@dataclass
class LinearizeReport(Document):
    """Wraps `data`, a dict of kind "linearize": settings, model, layers, quality (the parent, and
    what was measured on), stages (perplexity, cross_entropy, kl after each), transfer,
    distillation, approximation (see there), state_bytes, verification, environment. Perplexities
    come with their cross-entropy in nats a token."""

    data: dict
    terminal = (QUALITY, STATE)

    def __post_init__(self):
        if self.data.get("kind") != "linearize":
            raise ValueError(
                f"kind: got {self.data.get('kind')!r}, a linearization's report has 'linearize'"
            )

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
        data, parent = self.data, self.data["quality"]["before"]
        rows = [
            [
                "the parent",
                f"{parent['perplexity']:.4f}",
                f"{parent['cross_entropy']:.4f}",
                "-",
                "-",
            ]
        ]
        for stage in STAGES:
            if stage in data["stages"]:
                found = data["stages"][stage]
                trained = (data.get(stage) or {}).get("tokens")
                rows.append(
                    [
                        f"after {stage}",
                        number(found["perplexity"])
                        + percent(parent["perplexity"], found["perplexity"]),
                        number(found["cross_entropy"]),
                        number(found["kl"]),
                        number(trained) if trained else "-",
                    ]
                )
        quality = data["quality"]
        note = (
            f"On {quality['tokens']:,} held-out tokens ({quality['source']}) in windows of "
            f"{quality['context']:,}."
        )
        share = data["pretraining_tokens"] and self.tokens / data["pretraining_tokens"]
        note += f" Training saw {100 * share:.2f} % of the pretraining tokens." if share else ""
        header = (
            "",
            "Perplexity",
            "Cross-entropy (nats/token)",
            "KL to the parent (nats/token)",
            "Trained on (tokens)",
        )
        tables = [Table(QUALITY, header, rows, note)]
        states = [
            [
                f"{row['context']:,}",
                data_size(row["plain"]),
                data_size(row["ours"]),
                f"{row['plain'] / row['ours']:,.2f}x",
            ]
            for row in data["state_bytes"]
        ]
        header = ("Context (tokens)", "K/V cache", "Now", "Smaller by")
        tables.append(
            Table(STATE, header, states, "Bytes of one sequence, all layers, as declared.")
        )
        if moved := data["transfer"]:
            rows = [
                [str(i), number(a), number(b)]
                for i, (a, b) in enumerate(zip(moved["before"], moved["after"], strict=True))
            ]
            note = (
                "Squared distance of each layer's attention output from the parent's over the "
                "parent's square."
            )
            tables.append(
                Table("Attention transfer", ("Layer", "Before", "After"), rows, note, folded=True)
            )
        if learned := data["distillation"]:
            rows = [
                [number(point[name]) for name in ("tokens", "perplexity", "cross_entropy", "kl")]
                for point in learned["curve"]
            ]
            header = (
                "Tokens",
                "Perplexity",
                "Cross-entropy (nats/token)",
                "KL to the parent (nats/token)",
            )
            note = "On the first 8,192 held-out tokens."
            tables.append(Table("Distillation", header, rows, note, folded=True))
        if data.get("approximation"):
            for table in ApproximationReport(data["approximation"]).tables():
                tables.append(replace(table, title=f"{ERRORS}: {table.title}", folded=True))
        rows = [[str(row["layer"]), row["pattern"], row["projections"]] for row in data["layers"]]
        tables.append(Table("Layers", ("Layer", "Pattern", "Projections"), rows, folded=True))
        if data["verification"]:
            tables.append(pairs("Checkpoint, loaded again", data["verification"]))
        shown = {
            key: ", ".join(map(str, value)) if isinstance(value, list) else value
            for key, value in data["settings"].items()
            if key != "overrides"
        }
        return [
            *tables,
            pairs("Settings", shown),
            pairs("Model", data["model"]),
            pairs("Environment", data["environment"]),
        ]

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
