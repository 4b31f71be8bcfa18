"""The report of a head conversion: what it changed, what it cost in quality, what it gained, and
the proof.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
What was not measured says so: a missing number is never 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

from effattn.heads import report_plots
from effattn.heads.report_compare import compare_html
from effattn.heads.report_tables import heads_text, speed_ratio, tables
from effattn.reports.document import Document
from effattn.reports.page import Section, page
from effattn.reports.tables import Table, number, percent

__all__ = ["ConversionReport", "compare_html"]


@dataclass
class ConversionReport(Document):
    """Wraps `data`, a dict of kind "convert_gqa"; any of its measurements may be None or absent.

    Keys: settings, model, quality (perplexity; cross_entropy and kl in nats a token), uptraining,
    layers (relative squared errors), kv_bytes_per_token, decode (milliseconds a step, tokens/s,
    bytes), verification, environment."""

    data: dict
    terminal = ("Before and after", "Decoding", "Verification")

    def __post_init__(self):
        if self.data.get("kind") != "convert_gqa":
            raise ValueError(
                f"kind: got {self.data.get('kind')!r}, a conversion report has 'convert_gqa'"
            )

    def part(self, name: str) -> dict:
        """A part of `data`, empty if it is null or absent."""
        return self.data.get(name) or {}

    @property
    def settings(self) -> dict:
        """What was asked for; {} if the file has none."""
        return self.part("settings")

    @property
    def model(self) -> dict:
        """Facts of the model; {} if the file has none."""
        return self.part("model")

    @property
    def quality(self) -> dict:
        """Perplexity and KL by stage; {} if nothing was measured."""
        return self.part("quality")

    @property
    def uptraining(self) -> dict:
        """What training said; {} without one."""
        return self.part("uptraining")

    @property
    def verification(self) -> dict:
        """How the saved model was loaded again; {} if it was not."""
        return self.part("verification")

    @property
    def kv_bytes_per_token(self) -> dict:
        """Bytes before and after, over all layers."""
        return self.part("kv_bytes_per_token")

    @property
    def layers(self) -> list[dict]:
        """A row for each layer: errors of its new heads."""
        return self.data.get("layers") or []

    @property
    def decode(self) -> list[dict]:
        """Decoding times before and after, a row for each batch."""
        return self.data.get("decode") or []

    @property
    def curve(self) -> list[dict]:
        """Perplexity while it was trained."""
        return self.uptraining.get("curve") or []

    @property
    def kv_ratio(self) -> float | None:
        """How many times smaller the KV cache of a token is."""
        before, after = self.kv_bytes_per_token.get("before"), self.kv_bytes_per_token.get("after")
        return before / after if before and after else None

    def measured(self, stage: str, name: str = "perplexity") -> float | None:
        """`name` ("perplexity", "cross_entropy", "kl") at a stage ("before", "converted",
        "uptrained"), or None.
        """
        return (self.quality.get(stage) or {}).get(name)

    def excess(self, stage: str) -> float | None:
        """Cross-entropy above the parent's, nats a token."""
        before, after = (
            self.measured("before", "cross_entropy"),
            self.measured(stage, "cross_entropy"),
        )
        return None if before is None or after is None else after - before

    @property
    def curve_parent(self) -> float | None:
        """The parent's perplexity on the tokens the curve was measured on; None if these are other
        tokens.

        `uptraining["parent"]` has it, or the curve starts where `quality["converted"]` is: then
        they are the same."""
        own = (self.uptraining.get("parent") or {}).get("perplexity")
        converted = self.measured("converted")
        if own is not None or not self.curve or not converted:
            return own
        start = self.curve[0].get("perplexity")
        same = start is not None and math.isclose(start, converted, rel_tol=1e-3)
        return self.measured("before") if same else None

    @property
    def title(self) -> str:
        return f"{self.settings.get('model', 'model')}: {heads_text(self)} KV heads"

    @property
    def headline(self) -> str:
        """The result in one sentence of plain words."""
        parts = [f"{heads_text(self)} KV heads"]
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
            section("Settings", [], "Settings", "Model"),
            section("Environment", [], "Environment"),
        ]
        return page(self.title, self.headline, sections)
