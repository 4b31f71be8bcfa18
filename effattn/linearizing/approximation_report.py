"""The page that helps to choose an approximation: its error against exact attention, by budget and
by layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from effattn.hf import anatomy as hf
from effattn.profiling.environment import environment
from effattn.reports.document import Document
from effattn.reports.files import finite, write_all_atomic
from effattn.reports.page import Section, page
from effattn.reports.plots import NEUTRAL, PALETTE, Series, bar_plot, line_plot
from effattn.reports.tables import Table, pairs


@dataclass
class ApproximationReport(Document):
    """Wraps `data`, a dict of kind "approximation". rows: method, option, budget, inputs, error,
    and its cost beside exact attention's; matrices: relative errors of Monarch projections."""

    data: dict

    @classmethod
    def of(
        cls, model, rows: list[dict], matrices: list[dict], length: int, layers: list[int]
    ) -> ApproximationReport:
        """From what was measured on `model`, with its facts and the environment's."""
        parts = hf.of(model)
        facts = {
            "class": type(model).__name__,
            "layers_shown": layers,
            "heads": parts.heads,
            "kv_heads": parts.kv_heads,
            "head_dim": parts.layers[0].head_dim,
            "tokens": length,
        }
        return cls(
            {
                "kind": "approximation",
                "model": facts,
                "rows": rows,
                "matrices": matrices,
                "environment": environment(),
            }
        )

    @property
    def rows(self) -> list[dict]:
        """A row for each method, budget and layer."""
        return self.data["rows"]

    @property
    def methods(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    def mean(self, method: str) -> list[tuple[object, float]]:
        """(budget, error averaged over the model's layers)."""
        found: dict[object, list[float]] = {}
        for row in self.rows:
            if row["method"] == method and row["inputs"].startswith("layer"):
                found.setdefault(row["budget"], []).append(row["error"])
        return [(budget, sum(errors) / len(errors)) for budget, errors in found.items()]

    @property
    def headline(self) -> str:
        """One sentence: the best of every method."""
        best = {method: min(self.mean(method), key=lambda pair: pair[1]) for method in self.methods}
        order = sorted(best, key=lambda method: best[method][1])
        text = "; ".join(f"{method} ({best[method][0]}) {best[method][1]:.2f}" for method in order)
        if not text:
            return "Relative errors of Monarch projections of the model's own matrices."
        return (
            "Relative error against exact attention, nothing trained, mean over layers, best "
            f"budget tried: {text}."
        )

    @property
    def title(self) -> str:
        """One line: the model's class."""
        return f"{self.data['model']['class']}: error of approximate attention"

    def tables(self) -> list[Table]:
        """A table per method: budgets down, inputs across."""
        tables = []
        for method in self.methods:
            rows = [row for row in self.rows if row["method"] == method]
            inputs = list(dict.fromkeys(row["inputs"] for row in rows))
            lines = []
            for budget in dict.fromkeys(row["budget"] for row in rows):
                same = [row for row in rows if row["budget"] == budget]
                one, held = same[0], same[0]["state_bytes"]
                lines.append(
                    [
                        str(budget),
                        *(f"{row['error']:.3f}" for row in same),
                        f"{one['flops'] / one['dense_flops']:.2f}x",
                        "-" if held is None else f"{held / one['dense_state_bytes']:.2f}x",
                    ]
                )
            header = (rows[0]["option"], *inputs, "FLOPs of exact", "State of exact")
            tables.append(
                Table(method, header, lines, f"At {self.data['model']['tokens']:,} tokens.")
            )
        if self.data["matrices"]:
            lines = [
                [f"{row['matrix']}, {row['ratio']:g}", f"{row['kept']:.3f}", f"{row['error']:.3f}"]
                for row in self.data["matrices"]
            ]
            tables.append(
                Table(
                    "monarch", ("Matrix, ratio asked", "Parameters kept", "Relative error"), lines
                )
            )
        return tables

    def plots(self) -> dict[str, list[Markup]]:
        """Method -> its figures."""
        found = {}
        for method in self.methods:
            rows = [row for row in self.rows if row["method"] == method]
            names = list(dict.fromkeys(row["inputs"] for row in rows))
            by_name = {name: [row for row in rows if row["inputs"] == name] for name in names}
            colors = [
                NEUTRAL if not name.startswith("layer") else PALETTE[i % 8]
                for i, name in enumerate(names)
            ]
            if isinstance(rows[0]["budget"], str):
                series = [
                    (name, color, [row["error"] for row in by_name[name]])
                    for name, color in zip(names, colors, strict=True)
                ]
                groups = [row["budget"] for row in by_name[names[0]]]
                drawn = bar_plot(
                    f"{method}: error",
                    groups,
                    series,
                    rows[0]["option"],
                    "relative error",
                    width=10.8,
                )
            else:
                lines = [
                    Series(
                        name,
                        [row["budget"] for row in by_name[name]],
                        [row["error"] for row in by_name[name]],
                        color,
                    )
                    for name, color in zip(names, colors, strict=True)
                ]
                option = rows[0]["option"]
                drawn = line_plot(
                    f"{method}: error",
                    lines,
                    option,
                    "relative error",
                    contexts=True,
                    zero=True,
                    width=10.8,
                )
            found[method] = [drawn]
        if self.data["matrices"]:
            names = list(dict.fromkeys(row["matrix"] for row in self.data["matrices"]))
            lines = []
            for index, name in enumerate(names):
                rows = [row for row in self.data["matrices"] if row["matrix"] == name]
                color = NEUTRAL if name == "Gaussian" else PALETTE[index % 8]
                lines.append(
                    Series(
                        name, [row["kept"] for row in rows], [row["error"] for row in rows], color
                    )
                )
            found["monarch"] = [
                line_plot(
                    "monarch: error of the matrices",
                    lines,
                    "share of the parameters kept",
                    "relative error",
                    zero=True,
                    width=10.8,
                )
            ]
        return found

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        return Group(
            Text(self.headline), *(part for table in self.tables() for part in ("", table.rich()))
        )

    def to_json(self) -> str:
        """All of the data."""
        return json.dumps(finite(self.data), indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        plots = self.plots()
        sections = [
            Section(table.title, "", plots[table.title], [table]) for table in self.tables()
        ]
        facts = [pairs("Model", self.data["model"]), pairs("Environment", self.data["environment"])]
        return page(self.title, self.headline, [*sections, Section("Settings", tables=facts)])

    def save(self, folder: Path | str) -> None:
        """Writes approximation.md, .html and, last, .json into `folder`: all of them or none."""
        names = {"md": self.to_markdown(), "html": self.to_html(), "json": self.to_json()}
        write_all_atomic(folder, {f"approximation.{kind}": text for kind, text in names.items()})
