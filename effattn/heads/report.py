"""The report of a head conversion: what it changed, what it cost in quality, what it gained, and
the proof.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
What was not measured says so: a missing number is never 0."""

from __future__ import annotations

from dataclasses import dataclass

from effattn.heads import report_plots
from effattn.heads.report_compare import compare_html
from effattn.heads.report_data import ConversionData
from effattn.heads.report_tables import tables
from effattn.reports.common import HARNESS, speed_ratio
from effattn.reports.page import Section, page
from effattn.reports.tables import Table, number, percent

__all__ = ["ConversionReport", "compare_html"]


@dataclass
class ConversionReport(ConversionData):
    """A conversion's data as tables, plots and a page."""

    terminal = ("Before and after", "Decoding", "Verification")

    @property
    def title(self) -> str:
        return f"{self.settings.get('model', 'model')}: {self.change}"

    @property
    def change(self) -> str:
        """What became of the heads, in words."""
        return f"{self.heads_text} KV heads"

    @property
    def headline(self) -> str:
        """The result in one sentence of plain words."""
        parts = [self.change]
        if self.kv_ratio:
            parts[0] += f": the KV cache is {self.kv_ratio:.1f}x smaller"
        before, converted, uptrained = (
            self.measured(stage) for stage in ("before", "converted", "uptrained")
        )
        last = converted if uptrained is None else uptrained
        if before is None or last is None:
            parts.append("quality was not measured")
        else:
            text = f"perplexity {before:.2f} -> {last:.2f}{percent(before, last)}"
            if uptrained is not None:
                text += f" after uptraining on {number(self.uptraining.get('tokens'))} tokens"
                text += (
                    f" ({converted:.2f} right after conversion)" if converted is not None else ""
                )
            parts.append(text)
        timed = [row for row in self.decode if speed_ratio(row)]
        if timed:
            row = max(timed, key=lambda row: row["context"])
            parts.append(
                f"decoding at {row['context']:,} tokens runs at {speed_ratio(row):.2f}x the speed"
            )
        return "; ".join(parts) + "."

    def tables(self) -> list[Table]:
        return tables(self)

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        shown = {table.title: table for table in tables(self)}

        def section(title: str, plots: list, *names: str, note: str = "") -> Section:
            return Section(title, note, plots, [shown[name] for name in names if name in shown])

        note = ""
        if self.curve and self.curve_parent is None:
            note = (
                "The curve was measured on other tokens than the table above, so the parent is "
                "not drawn with it."
            )
        speed = report_plots.cache(self) + report_plots.decode(self)
        sections = [
            section("Before and after", [], "Before and after"),
            section(
                "Uptraining",
                report_plots.uptraining(self),
                "Uptraining",
                "Uptraining curve",
                note=note,
            ),
            section("KV cache and decoding", speed, "Decoding", "Time of a decoding step"),
            section("Error by layer", report_plots.layers(self), "Relative error by layer"),
            section("Verification", [], "Verification"),
            section(HARNESS, [], HARNESS),
            section("Settings", [], "Settings", "Model"),
            section("Environment", [], "Environment"),
        ]
        return page(self.title, self.headline, sections)
