"""The report of a shearing: what got smaller, what it cost in quality, how the masks and the
domains went.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup
from torch import nn

from effattn.profiling.environment import environment
from effattn.prune.shearing.measures import axes_of, size_of
from effattn.prune.shearing.report_data import (
    BASELINES,
    DOMAINS,
    MASKS,
    NAMES,
    QUALITY,
    SIZE,
    Baseline,
    ShearData,
    Stage,
)
from effattn.prune.shearing.report_plots import plots
from effattn.reports.common import QUALITY_HEADER, about, measured_on
from effattn.reports.page import Section, page
from effattn.reports.tables import UNKNOWN, Table, data_size, number, pairs, percent

SIZES = {
    "parameters": "Parameters",
    "layer_parameters": "Parameters in the layers",
    "file_bytes": "Weights on disk",
    "kv_bytes_per_token": "KV cache of a token",
    "flops_per_token": "FLOPs of a token, reading",
}


@dataclass
class ShearReport(ShearData):
    """A shearing's data as tables, plots and a page."""

    terminal = (QUALITY, SIZE, "Speed")

    @classmethod
    def of(
        cls,
        parent: nn.Module,
        small: nn.Module,
        length: int,
        stages: dict[str, Stage],
        *,
        settings: dict,
        quality: dict,
        baselines: dict[str, Baseline],
        file_bytes: int | None,
        pretraining_tokens: int | None,
    ) -> ShearReport:
        """What was done to `parent`; speed and proof are still to come. length: tokens of a window;
        file_bytes: of the parent's weight files; pretraining_tokens: of the parent."""
        before, after = size_of(parent, length), size_of(small, length)
        now = axes_of(small)
        return cls(
            {
                "kind": cls.kind,
                "settings": settings,
                "target": {axis: [size, now[axis]] for axis, size in axes_of(parent).items()},
                "model": {
                    "class": type(parent).__name__,
                    "dtype": str(parent.dtype).removeprefix("torch."),
                },
                "size": {"before": before | {"file_bytes": file_bytes}, "after": after},
                "quality": quality,
                **stages,
                "baselines": baselines,
                "speed": [],
                "verification": None,
                "pretraining_tokens": pretraining_tokens,
                "environment": environment(),
            }
        )

    @property
    def title(self) -> str:
        return f"{self.data['settings']['model']}: {self.label}"

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        data = self.data
        before, after = (data["size"][when]["parameters"] for when in ("before", "after"))
        text = f"{self.label}: {after:,} parameters instead of {before:,}"
        inside = [data["size"][when]["layer_parameters"] for when in ("before", "after")]
        text += f" ({100 * inside[1] / inside[0]:.0f} % of those in the layers)"
        parent, now = (
            data["quality"]["before"]["perplexity"],
            data["quality"][self.last]["perplexity"],
        )
        text += f"; perplexity {parent:.2f} -> {now:.2f} after {self.tokens:,} tokens"
        if data["pretraining_tokens"]:
            text += f" ({100 * self.tokens / data['pretraining_tokens']:.1f} % of pretraining)"
        for name, row in self.baselines.items():
            text += f"; {_baseline(name, row)} {row['continued']['perplexity']:.2f}"
        return text + "."

    def tables(self) -> list[Table]:
        """Every table, the headline's first."""
        data = self.data
        tables = [self._quality_table(), self._size_table()]
        if rows := data["speed"]:
            cells = [
                [row["what"], *(_rate(row.get(when)) for when in ("before", "after")), _ratio(row)]
                for row in rows
            ]
            tables.append(
                Table(
                    "Speed",
                    ("", "Before (tokens/s)", "After (tokens/s)", "Faster by"),
                    cells,
                    "Medians, the two models taking turns; one sequence.",
                )
            )
        tables += [self._masks_table(), *self._domain_tables()]
        if data["verification"]:
            tables.append(pairs("Checkpoint, loaded by plain transformers", data["verification"]))
        return [*tables, *about(data)]

    def _quality_table(self) -> Table:
        data, quality = self.data, self.data["quality"]
        parent = quality["before"]

        def row(label: str, found: dict, tokens: int | None) -> list[str]:
            return [
                label,
                number(found["perplexity"]) + percent(parent["perplexity"], found["perplexity"]),
                number(found["cross_entropy"]),
                number(found["kl"]),
                number(tokens) if tokens else "-",
            ]

        rows = [
            ["the parent", number(parent["perplexity"]), number(parent["cross_entropy"]), "-", "-"]
        ]
        if quality.get("cut"):
            rows.append(
                row("sheared, right after cutting", quality["cut"], data["masks"]["tokens"])
            )
        seen = data["masks"]["tokens"]
        for stage, label in (("recovered", "taught by the parent"), ("continued", "trained on")):
            if quality.get(stage):
                seen += data[stage]["tokens"]
                rows.append(row(f"sheared, {label}", quality[stage], seen))
        for name, found in self.baselines.items():
            rows.append(row(f"{_baseline(name, found)}: start", found["cut"], None))
            rows.append(
                row(_baseline(name, found), found["continued"], found["training"]["tokens"])
            )
        note = measured_on(quality)
        if data["pretraining_tokens"]:
            note += f" Pretraining had {data['pretraining_tokens']:,} tokens."
        taught = data["masks"]["tokens"] if data["settings"]["distill"] else 0
        taught += (data.get("recovered") or {}).get("tokens", 0)
        if self.baselines and taught:
            note += (
                f" {taught:,} of the sheared model's tokens taught the parent's predictions, "
                "and as many of the "
            )
            note += "baseline's that is taught by it; all others the text alone."
        header = ("", *QUALITY_HEADER, "Trained on (tokens)")
        return Table(QUALITY, header, rows, note)

    def _size_table(self) -> Table:
        data = self.data
        rows = [
            [
                NAMES[axis][0].upper() + NAMES[axis][1:],
                number(before),
                number(after),
                f"{before / after:.2f}x",
            ]
            for axis, (before, after) in data["target"].items()
        ]
        for key, label in SIZES.items():
            before, after = (data["size"][when][key] for when in ("before", "after"))
            write = (
                data_size
                if "bytes" in key
                else lambda value: UNKNOWN if value is None else f"{value:,.0f}"
            )
            rows.append(
                [
                    label,
                    write(before),
                    write(after),
                    f"{before / after:.2f}x" if before and after else UNKNOWN,
                ]
            )
        return Table(SIZE, ("", "Before", "After", "Smaller by"), rows)

    def _masks_table(self) -> Table:
        record, axes = self.data["masks"]["record"], list(self.data["masks"]["target"])
        header = (
            "Tokens",
            *(f"{NAMES[axis]}: {what}" for axis in axes for what in ("removed", "target")),
        )
        rows = [
            [
                number(point["tokens"]),
                *(
                    f"{100 * point[what][axis]:.1f} %"
                    for axis in axes
                    for what in ("removed", "target")
                ),
            ]
            for point in record
        ]
        note = "The expected share that is removed, and what the constraint asked for."
        return Table(MASKS, header, rows, note, folded=True)

    def _domain_tables(self) -> list[Table]:
        names = self.data["masks"]["domains"]
        points = self.points()
        header = ("Tokens", *names)
        loss = [[number(tokens), *map(number, point["losses"])] for tokens, point in points]
        share = [
            [number(tokens), *(f"{100 * one:.1f} %" for one in point["weights"])]
            for tokens, point in points
        ]
        references = dict(zip(names, self.data["masks"]["references"], strict=True))
        said = ", ".join(f"{name} {value:.3f}" for name, value in references.items())
        return [
            Table("Domain weights", header, share, "How often each domain is read.", folded=True),
            Table(
                "Domain losses",
                header,
                loss,
                f"Nats a token on held-out windows. References: {said}.",
                folded=True,
            ),
        ]

    def plots(self) -> dict[str, list[Markup]]:
        """Section -> its figures."""
        return plots(self)

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        tables, plots = {table.title: table for table in self.tables()}, self.plots()
        inside = {"Domain weights": DOMAINS, "Domain losses": DOMAINS}
        sections: dict[str, Section] = {}
        for title, table in tables.items():
            name = inside.get(title, title)
            section = sections.setdefault(name, Section(name, "", plots.get(name, [])))
            section.tables.append(table)
        return page(self.title, self.headline, list(sections.values()))


def _baseline(name: str, row: Baseline) -> str:
    """What a baseline is, with the criteria that it is cut by."""
    what, *how = BASELINES[name].split(",")
    criteria = dict.fromkeys((row.get("criterion") or {}).values())
    return ",".join([f"{what} by {' and '.join(criteria)}" if criteria else what, *how])


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.1f}"


def _ratio(row: dict) -> str:
    before, after = row.get("before"), row.get("after")
    return f"{after / before:.2f}x" if before and after else UNKNOWN
