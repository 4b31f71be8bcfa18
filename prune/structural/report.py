"""The report of structured pruning: what went, what it cost in quality, and what it saves.

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from torch import nn

from effattn.hf import anatomy as hf
from effattn.profiling.cost import model_cost
from effattn.reports.common import (
    DECODING,
    EXCESS,
    QUALITY_HEADER,
    TURNS,
    about,
    decode_table,
    measured_on,
)
from effattn.reports.document import Document
from effattn.reports.page import Section, page
from effattn.reports.plots import AFTER, BEFORE, PALETTE, UPTRAINED, Series, bar_plot, line_plot
from effattn.reports.tables import Table, number, pairs, percent
from effattn.surgery.describing import describe

KIND = "prune_structured"
QUALITY, RUNS = "Before and after", "Criteria compared"
ERRORS, IMPORTANCE = "Error of each layer's outputs", "Importance"
KL = "KL to the whole model (nats/token)"
NAMES = {"heads": "heads", "ffn": "FFN dimensions", "layers": "layers"}
MOST_LINES = 8  # layers in one plot


class LayerErrors(TypedDict):
    """Squared distance of a layer's outputs from what the whole layer gives, over its square; None
    where nothing was cut."""

    layer: int  # its number in the whole model
    heads_error_sliced: float | None  # attention: right after cutting
    heads_error: float | None  # and after o_proj was solved again
    ffn_error_sliced: float | None
    ffn_error: float | None


def sizes_of(model: nn.Module) -> dict[str, int | float | None]:
    """Shape and costs of a model. kv_bytes_per_token: of all layers; flops_per_token: of a decoding
    step with an empty cache; ffn: inner dimensions, None for mixtures of experts. Where layers
    differ, heads, kv_heads and ffn are their means."""
    told, parts = describe(model), hf.of(model)
    first = parts.layers[0]
    return {
        "layers": len(parts.layers),
        "heads": _mean(layer.heads for layer in parts),
        "kv_heads": _mean(layer.kv_heads for layer in parts),
        "head_dim": parts.head_dim,
        "ffn": _mean(layer.feed_forward.size for layer in parts) if first.family.ffn_in else None,
        "parameters": told.parameters["total"],
        "weight_bytes": sum(p.nbytes for p in dict.fromkeys(model.parameters())),
        "kv_bytes_per_token": told.kv_bytes_per_token,
        "flops_per_token": model_cost(model, 1, 1).total.flops,
    }


def _mean(sizes: Iterable[int]) -> int | float:
    """A whole number where it is one."""
    found = list(sizes)
    mean = sum(found) / len(found)
    return int(mean) if mean.is_integer() else round(mean, 2)


@dataclass
class StructuredReport(Document):
    """Wraps `data`, a dict of kind "prune_structured".

    settings, model (class, dtype), kept (indices by target), importance (scores by target and
    layer; of FFN dimensions their percentiles, 101 a layer), layers (errors before and after the
    output modules were solved again), sizes ({"before", "after"}: see `sizes_of`, and file_bytes),
    quality ("before", "pruned", and what was measured on), runs (criteria compared), decode,
    verification, environment. What was not measured is None or absent."""

    data: dict
    kind = KIND
    named = "a structured pruning's report"
    terminal = (QUALITY, RUNS, DECODING, "Verification")

    @property
    def layers(self) -> list[LayerErrors]:
        """A row for each layer."""
        return self.data["layers"]

    @property
    def label(self) -> str:
        """What went, "4 of 8 heads, 528 of 704 FFN dimensions"."""
        before, settings = self.data["sizes"]["before"], self.data["settings"]
        said = []
        for target, name in NAMES.items():
            if target in settings:
                whole = before["kv_heads" if target == "heads" else target]
                groups = target == "heads" and before["heads"] != before["kv_heads"]
                said.append(
                    f"{settings[target]:,} of {whole:,} {'key/value heads' if groups else name}"
                )
        return ", ".join(said)

    @property
    def title(self) -> str:
        return f"{self.data['settings']['model']}: {self.label}"

    @property
    def excess(self) -> float | None:
        """Cross-entropy over the whole model's, nats a token; None if it was not measured."""
        quality = self.part("quality")
        return (
            quality["pruned"]["cross_entropy"] - quality["before"]["cross_entropy"]
            if quality
            else None
        )

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        before, after = (self.data["sizes"][when] for when in ("before", "after"))
        text = f"Kept {self.label}: {before['parameters']:,} -> {after['parameters']:,} parameters"
        text += percent(before["parameters"], after["parameters"])
        if after["kv_bytes_per_token"] != before["kv_bytes_per_token"]:
            text += (
                f", {before['kv_bytes_per_token']:,} -> {after['kv_bytes_per_token']:,} KV "
                "bytes a token"
            )
        if quality := self.part("quality"):
            first, last = (quality[when]["perplexity"] for when in ("before", "pruned"))
            text += f"; perplexity {first:.2f} -> {last:.2f}{percent(first, last)} without training"
        return text + "."

    # ---- tables ----

    def tables(self) -> list[Table]:
        """Every table, the headline's first."""
        data = self.data
        tables = [self._before_and_after()]
        tables += [self._runs()] if data.get("runs") else []
        tables += [decode_table(data["decode"], TURNS)] if data.get("decode") else []
        tables += [pairs("Verification", data["verification"])] if data.get("verification") else []
        if self.layers:
            columns = ("heads_error_sliced", "heads_error", "ffn_error_sliced", "ffn_error")
            rows = [
                [
                    number(row["layer"]),
                    *("-" if row[name] is None else number(row[name]) for name in columns),
                ]
                for row in self.layers
            ]
            header = (
                "Layer",
                "Attention, cut",
                "Attention, solved again",
                "FFN, cut",
                "FFN, solved again",
            )
            note = (
                "Squared distance from what the whole layer gives, over its square, on the "
                "calibration tokens."
            )
            tables.append(Table(ERRORS, header, rows, note, folded=True))
        settings = {
            key: ", ".join(f"{k}: {v}" for k, v in value.items()) if key == "criterion" else value
            for key, value in data["settings"].items()
        }
        return [*tables, *about(data | {"settings": settings})]

    def _before_and_after(self) -> Table:
        quality, sizes, rows = self.part("quality"), self.data["sizes"], []
        if quality:
            names = {
                "perplexity": "Perplexity",
                "cross_entropy": "Cross-entropy (nats/token)",
                "kl": KL,
            }
            for name, label in names.items():
                before, after = quality["before"].get(name), quality["pruned"][name]
                change = percent(before, after) if name == "perplexity" else ""
                rows.append(
                    [label, "-" if before is None else number(before), number(after) + change]
                )
        names = {
            "layers": "Layers",
            "heads": "Query heads",
            "kv_heads": "Key/value heads",
            "ffn": "FFN dimensions",
            "parameters": "Parameters",
            "file_bytes": "Weight files (bytes)",
            "weight_bytes": "Weights in memory (bytes)",
            "kv_bytes_per_token": "KV cache (bytes/token)",
            "flops_per_token": "FLOPs a token",
        }
        for name, label in names.items():
            before, after = (sizes[when].get(name) for when in ("before", "after"))
            if after is not None:
                rows.append(
                    [
                        label,
                        number(before),
                        number(after) + (percent(before, after) if before != after else ""),
                    ]
                )
        note = "No training."
        if quality:
            note += f" {measured_on(quality)}"
        return Table(QUALITY, ("", "Before", "After"), rows, note)

    def _runs(self) -> Table:
        before = self.data["quality"]["before"]
        rows = [
            [
                "the whole model",
                "-",
                f"{before['perplexity']:.4f}",
                f"{before['cross_entropy']:.4f}",
                "-",
                "-",
                "-",
            ]
        ]
        for run in self.data["runs"]:
            rows.append(
                [
                    run["criterion"],
                    run["compensation"],
                    number(run["perplexity"]) + percent(before["perplexity"], run["perplexity"]),
                    number(run["cross_entropy"]),
                    number(run["cross_entropy"] - before["cross_entropy"]),
                    number(run["kl"]),
                    f"{run['seconds']:.1f}",
                ]
            )
        header = ("Criterion", "Solved again", *QUALITY_HEADER[:2], EXCESS, KL, "Seconds")
        return Table(RUNS, header, rows, "The same shape. Seconds of scoring, cutting and solving.")

    # ---- plots ----

    def plots(self) -> dict[str, list]:
        """Section -> its figures."""
        found: dict[str, list] = {IMPORTANCE: self._importance()}
        if runs := self.data.get("runs"):
            whole = self.data["quality"]["before"]["cross_entropy"]
            excess = {
                (run["criterion"], run["compensation"]): run["cross_entropy"] - whole
                for run in runs
            }
            names, kinds = (
                list(dict.fromkeys(run[key] for run in runs))
                for key in ("criterion", "compensation")
            )
            series = [
                (
                    f"solved again: {kind}",
                    PALETTE[index],
                    [excess.get((name, kind)) for name in names],
                )
                for index, kind in enumerate(kinds)
            ]
            found[RUNS] = [
                bar_plot(
                    "Excess cross-entropy by criterion",
                    names,
                    series,
                    "criterion",
                    "nats a token",
                    width=10.8,
                )
            ]
        shown = {
            "heads_error_sliced": ("attention, cut", BEFORE),
            "heads_error": ("attention, solved again", AFTER),
            "ffn_error_sliced": ("FFN, cut", PALETTE[4]),
            "ffn_error": ("FFN, solved again", UPTRAINED),
        }
        series = [
            (label, color, [row[key] for row in self.layers])
            for key, (label, color) in shown.items()
        ]
        series = [one for one in series if any(value is not None for value in one[2])]
        if series:
            names = [str(row["layer"]) for row in self.layers]
            found[ERRORS] = [
                bar_plot(ERRORS, names, series, "layer", "relative squared error", width=10.8)
            ]
        return found

    def _importance(self) -> list:
        """Heads and FFN dimensions: each layer's scores from high to low over their mean, the cut
        marked; layers: a bar each."""
        importance, sizes, plots = self.part("importance"), self.data["sizes"]["before"], []
        for target in ("heads", "ffn"):
            rows = importance.get(target, ())
            lines = [
                _curve(f"layer {index}", rows[index], target, place)
                for place, index in enumerate(_spread(len(rows)))
            ]
            if lines:
                cut = (
                    100
                    * self.data["settings"][target]
                    / sizes["kv_heads" if target == "heads" else "ffn"]
                )
                x_label = f"{NAMES[target]} (%, most important first)"
                plots.append(
                    line_plot(
                        f"Importance of {NAMES[target]}",
                        lines,
                        x_label,
                        "score over the layer's mean",
                        mark=(cut, "kept up to here"),
                        zero=True,
                    )
                )
        if "layers" in importance:
            scores, kept = importance["layers"], set(self.data["kept"]["layers"])
            parts = [
                ("stays", AFTER, [s if i in kept else None for i, s in enumerate(scores)]),
                ("goes", BEFORE, [None if i in kept else s for i, s in enumerate(scores)]),
            ]
            names = [str(index) for index in range(len(scores))]
            plots.append(bar_plot("Importance of layers", names, parts, "layer", "score"))
        return plots

    def to_html(self) -> str:
        """A self-contained page that makes no request."""
        plots, tables = self.plots(), self.tables()
        sections = [
            Section(table.title, "", plots.get(table.title, []), [table]) for table in tables
        ]
        sections.insert(1, Section(IMPORTANCE, "", plots[IMPORTANCE]))
        return page(self.title, self.headline, sections)


def _spread(layers: int) -> list[int]:
    """At most `MOST_LINES` of so many layers, first and last among them."""
    count = min(layers, MOST_LINES)
    return [round(place * (layers - 1) / max(1, count - 1)) for place in range(count)]


def _curve(label: str, scores: list[float], target: str, place: int) -> Series:
    """One layer's scores from high to low, over their mean; FFN dimensions come as percentiles."""
    scores = sorted(scores, reverse=True)
    mean = sum(scores) / len(scores) or 1.0
    heads = target == "heads"
    x = [100 * (i + heads) / (len(scores) - (not heads)) for i in range(len(scores))]
    y = [score / mean for score in scores]
    return Series(label, x, y, PALETTE[place % len(PALETTE)], marker=None if heads else "")
