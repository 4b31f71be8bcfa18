"""The report of a shearing: what got smaller, what it cost in quality, how the masks and the
domains went.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effattn.reports.common import QUALITY_HEADER, about, measured_on
from effattn.reports.document import Document
from effattn.reports.figures import token_axis
from effattn.reports.page import Section, page
from effattn.reports.plots import AFTER, NEUTRAL, PALETTE, Series, bar_plot, line_plot
from effattn.reports.tables import UNKNOWN, Table, data_size, number, pairs, percent

NAMES = {
    "hidden": "hidden dimensions",
    "heads": "KV heads",
    "ffn": "FFN dimensions",
    "layers": "layers",
}
BASELINES = {
    "scratch": "the same shape from scratch",
    "structured": "one-shot pruning, trained on",
    "taught": "one-shot pruning, taught by the parent",
}
SIZES = {
    "parameters": "Parameters",
    "layer_parameters": "Parameters in the layers",
    "file_bytes": "Weights on disk",
    "kv_bytes_per_token": "KV cache of a token",
    "flops_per_token": "FLOPs of a token, reading",
}
QUALITY, SIZE = "Quality", "Before and after"
MASKS, DOMAINS = "Masks", "Domains"
STAGES = ("masks", "recovered", "continued")


@dataclass
class ShearReport(Document):
    """Wraps `data`, a dict of kind "shear": settings, target (axis -> [before, after]), model,
    size, quality (before, cut, recovered, continued: perplexity, cross_entropy and kl in nats a
    token), masks, recovered and continued (what training says, with its record), baselines, speed
    (tokens/s), verification, environment."""

    data: dict
    kind = "shear"
    named = "a shearing's report"
    terminal = (QUALITY, SIZE, "Speed")

    @property
    def label(self) -> str:
        """The change of shape: "KV heads 8 -> 4, FFN dimensions 704 -> 352"."""
        changed = {
            axis: sizes for axis, sizes in self.data["target"].items() if sizes[0] != sizes[1]
        }
        return ", ".join(
            f"{NAMES[axis]} {before:,} -> {after:,}" for axis, (before, after) in changed.items()
        )

    @property
    def title(self) -> str:
        return f"{self.data['settings']['model']}: {self.label}"

    @property
    def last(self) -> str:
        """The last stage that was measured."""
        return next(
            stage for stage in ("continued", "recovered", "cut") if self.data["quality"].get(stage)
        )

    @property
    def tokens(self) -> int:
        """Tokens that all stages saw."""
        return sum((self.data.get(stage) or {}).get("tokens", 0) for stage in STAGES)

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
        for name, row in data["baselines"].items():
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
        for name, found in data["baselines"].items():
            rows.append(row(f"{_baseline(name, found)}: start", found["cut"], None))
            rows.append(
                row(_baseline(name, found), found["continued"], found["training"]["tokens"])
            )
        note = measured_on(quality)
        if data["pretraining_tokens"]:
            note += f" Pretraining had {data['pretraining_tokens']:,} tokens."
        taught = data["masks"]["tokens"] if data["settings"]["distill"] else 0
        taught += (data.get("recovered") or {}).get("tokens", 0)
        if data["baselines"] and taught:
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
        points = self._points()
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

    def _points(self) -> list[tuple[int, dict]]:
        """The records of all stages as one: (tokens since the start, point)."""
        found, before = [], 0
        for stage in STAGES:
            facts = self.data.get(stage) or {"tokens": 0, "record": []}
            found += [(before + point["tokens"], point) for point in facts["record"]]
            before += facts["tokens"]
        return found

    def plots(self) -> dict[str, list]:
        """Section -> its figures."""
        data, quality = self.data, self.data["quality"]
        bars = {"the parent": quality["before"], "sheared": quality[self.last]}
        bars |= {name: row["continued"] for name, row in data["baselines"].items()}
        values = [found["perplexity"] for found in bars.values()]
        found = {
            QUALITY: [
                bar_plot(
                    "Perplexity", list(bars), [("perplexity", AFTER, values)], "", "perplexity"
                )
            ]
        }
        found[QUALITY].append(self._loss_plot())
        record = data["masks"]["record"]
        x, unit = token_axis([point["tokens"] for point in record])
        lines = []
        for index, axis in enumerate(data["masks"]["target"]):
            lines.append(
                Series(NAMES[axis], x, [point["removed"][axis] for point in record], PALETTE[index])
            )
            lines.append(
                Series(
                    f"{NAMES[axis]}: target",
                    x,
                    [point["target"][axis] for point in record],
                    PALETTE[index],
                    "--",
                    "",
                )
            )
        found[MASKS] = [line_plot("Share removed, expected", lines, unit, "share", zero=True)]
        points = self._points()
        x, unit = token_axis([tokens for tokens, _ in points])
        lines = [
            Series(
                name,
                x,
                [point["weights"][index] for _, point in points],
                PALETTE[index % len(PALETTE)],
            )
            for index, name in enumerate(data["masks"]["domains"])
        ]
        found[DOMAINS] = [line_plot("Domain weights", lines, unit, "share of windows", zero=True)]
        lines = []
        for index, (name, level) in enumerate(
            zip(data["masks"]["domains"], data["masks"]["references"], strict=True)
        ):
            above = [point["losses"][index] - level for _, point in points]
            lines.append(Series(name, x, above, PALETTE[index % len(PALETTE)]))
        found[DOMAINS].append(line_plot("Loss above the reference", lines, unit, "nats a token"))
        return found

    def _loss_plot(self):
        """The held-out loss, the domains' mean, over the tokens of each run."""
        runs: dict[str, tuple[Sequence[int], list[float]]] = {}
        points = self._points()
        runs["sheared"] = (
            [tokens for tokens, _ in points],
            [_mean(point["losses"]) for _, point in points],
        )
        for name, row in self.data["baselines"].items():
            record = row["training"]["record"]
            runs[name] = (
                [point["tokens"] for point in record],
                [_mean(point["losses"]) for point in record],
            )
        flat = [tokens for tokens, _ in runs.values() for tokens in tokens]
        scaled, unit = token_axis(flat)
        place = dict(zip(flat, scaled, strict=True))
        lines = [
            Series(name, [place[tokens] for tokens in x], y, PALETTE[index])
            for index, (name, (x, y)) in enumerate(runs.items())
        ]
        level = _mean(self.data["masks"]["references"])
        lines.append(
            Series("the parent", [min(scaled), max(scaled)], [level, level], NEUTRAL, "--", "")
        )
        return line_plot("Held-out loss while training", lines, unit, "nats a token")

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


def _baseline(name: str, row: dict) -> str:
    """What a baseline is, with the criteria that it is cut by."""
    what, *how = BASELINES[name].split(",")
    criteria = dict.fromkeys((row.get("criterion") or {}).values())
    return ",".join([f"{what} by {' and '.join(criteria)}" if criteria else what, *how])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.1f}"


def _ratio(row: dict) -> str:
    before, after = row.get("before"), row.get("after")
    return f"{after / before:.2f}x" if before and after else UNKNOWN
