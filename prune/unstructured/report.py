"""The report of one-shot pruning: what went, what it cost in quality, and what it saves (and what
not).

One JSON-able dict is the report; Markdown, HTML and the terminal show the same tables made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import nn

from effattn.profiling.cost import model_cost
from effattn.profiling.environment import environment
from effattn.prune.unstructured.nm import Sparsity
from effattn.reports.common import (
    DECODING,
    EXCESS,
    QUALITY_HEADER,
    QUALITY_NAMES,
    TURNS,
    about,
    curve_table,
    decode_table,
    measured_on,
)
from effattn.reports.document import Document
from effattn.reports.plots import AFTER, BEFORE, PALETTE, Series, bar_plot, line_plot
from effattn.reports.tables import Table, number, pairs, percent
from effattn.surgery.describing import describe

KIND = "prune_oneshot"
QUALITY, METHODS = "Before and after", "Methods compared"
STAGES = {"pruned": "After pruning", "distilled": "After distillation"}
SIZES = {
    "parameters": "Parameters",
    "nonzero_parameters": "Nonzero parameters",
    "file_bytes": "Weight files (bytes)",
    "weight_bytes": "Weights in memory (bytes)",
    "kv_bytes_per_token": "KV cache (bytes/token)",
    "flops_per_token": "FLOPs a token, as dense products run",
    "flops_of_nonzeros": "FLOPs a token, by nonzeros alone",
}
DECODE_NOTE = f"{TURNS} Dense products do not skip zeros."
SAVES_NOTHING = (
    "Zeros are stored like other weights: files, memory and the time of products are as before. "
)
PACK = (
    "effattn.prune.pack(model) stores 2:4 weights in 9/16 of the bytes (bf16) and multiplies "
    "by them as they are."
)
BITMASK = (
    "effattn.prune.pack(model, format='bitmask') stores the others and a bit for each weight, half "
    "of the weights in 9/16 of the bytes (bf16), and multiplies by them as they are."
)


class LinearFacts(TypedDict):
    """One pruned matrix; `loss` and `damping` are SparseGPT's."""

    name: str
    shape: list[int]  # outputs, inputs
    zeros: int
    loss: NotRequired[float]
    damping: NotRequired[float]


class LayerFacts(TypedDict):
    """One decoder layer, as `prune_layer` tells it."""

    layer: int
    sparsity: str  # as asked for: "0.5", "2:4"
    weights: int  # of the matrices that were pruned
    zeros: int
    error: float | None  # relative squared error of the layer's output; None: nothing was run
    seconds: float
    linears: list[LinearFacts]


def counts(model: nn.Module) -> dict[str, int]:
    """Sizes of a model: parameters, zeros among them, the bytes they take, KV bytes and FLOPs a
    token.

    flops_per_token: of a decoding step with an empty cache, zeros included; flops_of_nonzeros:
    without products by 0."""
    told = describe(model)
    parameters = list(dict.fromkeys(model.parameters()))
    zeros = sum(int((p == 0).sum()) for p in parameters)
    zero_products = sum(
        int((m.weight == 0).sum())
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.weight.dim() == 2
    )
    flops = model_cost(model, 1, 1).total.flops
    return {
        "parameters": told.parameters["total"],
        "nonzero_parameters": told.parameters["total"] - zeros,
        "weight_bytes": sum(p.nbytes for p in parameters),
        "kv_bytes_per_token": told.kv_bytes_per_token,
        "flops_per_token": flops,
        "flops_of_nonzeros": flops - 2 * zero_products,
    }


@dataclass
class OneShotReport(Document):
    """Wraps `data`, a dict of kind "prune_oneshot".

    settings, model (class, dtype), layers (of `prune_layer`), sizes ({"before", "after"}: see
    `counts`), quality (what was measured on, "before" and the stages), runs (methods compared),
    distillation, decode, packing (`PackReport.facts`), verification, environment. What was not
    measured, or done, is None or absent."""

    data: dict
    kind = KIND
    named = "a one-shot pruning's report"
    terminal = (QUALITY, METHODS, DECODING, "Verification")

    @classmethod
    def of(cls, model: nn.Module, layers: list[LayerFacts], settings: dict) -> OneShotReport:
        """The report of what was done to `model` in memory."""
        told = describe(model)
        found = counts(model)
        return cls(
            {
                "kind": KIND,
                "settings": {**settings, "sparsities": [one["sparsity"] for one in layers]},
                "model": {"class": told.model, "dtype": told.dtype},
                "layers": layers,
                "sizes": {"after": found},
                "environment": environment(),
            }
        )

    @classmethod
    def of_files(cls, facts: dict, file_bytes: int) -> OneShotReport:
        """The report of what was done from file to file, before a model is in memory. facts: what
        `prune_files` returns; file_bytes: of the source."""
        return cls(
            {
                "kind": KIND,
                "settings": facts["settings"],
                "model": {},
                "layers": facts["layers"],
                "sizes": {"before": {"file_bytes": file_bytes}, "after": {}},
                "verification": facts["verification"],
                "environment": environment(),
            }
        )

    def add_run(
        self, method: str, sparsity: str, seconds: float, layers: list[LayerFacts], quality: dict
    ) -> None:
        """One of the methods and sparsities that are compared; sparsity as asked for."""
        run = {"method": method, "sparsity": sparsity, "seconds": seconds}
        run["errors"] = [layer["error"] for layer in layers]
        self.data.setdefault("runs", []).append(run | quality)

    @property
    def layers(self) -> list[LayerFacts]:
        """A row for each matrix."""
        return self.data["layers"]

    @property
    def sparsity(self) -> float:
        """Zeros over weights, of the matrices that were pruned."""
        return sum(one["zeros"] for one in self.layers) / sum(one["weights"] for one in self.layers)

    @property
    def label(self) -> str:
        """ "sparsegpt, 2:4"."""
        settings = self.data["settings"]
        text = str(settings["sparsity"])
        return f"{settings['method']}, {text if ',' in text else Sparsity.parse(text).label}"

    @property
    def title(self) -> str:
        return f"{self.part('settings').get('model', 'model')}: {self.label}"

    @property
    def packs(self) -> bool:
        """Whether all matrices are 2:4, so that `effattn.prune.pack` takes them as that."""
        return all(one["sparsity"] == "2:4" for one in self.layers)

    @property
    def saves(self) -> str:
        """What became of the zeros: nothing, and what can; or the bytes of the packed layers."""
        packing = self.part("packing")
        if not packing:
            return SAVES_NOTHING + (PACK if self.packs else BITMASK)
        before, after = packing["bytes_before"], packing["bytes_after"]
        return (
            f"Packed ({packing['format']}), the linear layers take {after:,} of {before:,} bytes "
            f"({after / before:.3f}x); effattn.load reads them."
        )

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        weights = sum(one["weights"] for one in self.layers)
        text = f"{self.label}: {100 * self.sparsity:.4g} % of {weights:,} weights are zero"
        before, quality = self.part("quality").get("before"), self.part("quality")
        if before and quality.get("pruned"):
            first, last = (
                quality["pruned"]["perplexity"],
                (quality.get("distilled") or quality["pruned"])["perplexity"],
            )
            text += (
                f"; perplexity {before['perplexity']:.2f} -> "
                f"{last:.2f}{percent(before['perplexity'], last)}"
            )
            if quality.get("distilled"):
                text += (
                    f" after distillation on {self.data['distillation']['tokens']:,} tokens "
                    f"({first:.2f} before it)"
                )
        return f"{text}. {self.saves}"

    def excess(self, stage: str) -> float | None:
        """Cross-entropy over the dense model's, nats a token, at "pruned" or "distilled"."""
        quality = self.part("quality")
        if not quality.get(stage):
            return None
        return quality[stage]["cross_entropy"] - quality["before"]["cross_entropy"]

    # ---- tables ----

    def tables(self) -> list[Table]:
        """Every table, the headline's first."""
        data = self.data
        tables = [self._before_and_after()]
        if data.get("runs"):
            tables.append(self._methods())
        if data.get("decode"):
            tables.append(decode_table(data["decode"], DECODE_NOTE))
        if data.get("packing"):
            tables.append(pairs("Packed", data["packing"]))
        if data.get("verification"):
            tables.append(pairs("Verification", data["verification"]))
        if learned := data.get("distillation"):
            note = "On the first 8,192 held-out tokens."
            tables.append(curve_table("Distillation", "Tokens", learned["curve"], note))
        return [*tables, self._layers(), self._linear_layers(), *about(data)]

    def _layers(self) -> Table:
        rows = [
            [
                number(one["layer"]),
                Sparsity.parse(one["sparsity"]).label,
                number(one["zeros"]),
                number(one["weights"]),
                number(one["error"]),
                f"{one['seconds']:.2f}",
            ]
            for one in self.layers
        ]
        header = ("Layer", "Asked for", "Zeros", "Weights", "Error", "Seconds")
        note = (
            "Error: squared distance of the layer's output from the dense layer's on the same "
            "input, over its square."
        )
        return Table("Layers", header, rows, note, folded=True)

    def _linear_layers(self) -> Table:
        rows = [
            [
                f"{one['layer']}: {linear['name']}",
                " x ".join(map(str, linear["shape"])),
                number(linear["zeros"]),
                number(linear["damping"]) if "damping" in linear else "-",
            ]
            for one in self.layers
            for linear in one["linears"]
        ]
        return Table("Linear layers", ("Layer", "Shape", "Zeros", "Damping"), rows, folded=True)

    def _before_and_after(self) -> Table:
        quality, sizes = self.part("quality"), self.part("sizes")
        stages = [stage for stage in STAGES if stage == "pruned" or quality.get(stage)]
        rows = []
        if quality:
            for name, label in zip(QUALITY_NAMES, QUALITY_HEADER, strict=True):
                cells = [quality["before"].get(name), *(quality[stage][name] for stage in stages)]
                said = [number(one) for one in cells]
                if name == "perplexity":
                    said[1:] = [number(one) + percent(cells[0], one) for one in cells[1:]]
                rows.append([label, "-" if name == "kl" else said[0], *said[1:]])
        for name, label in SIZES.items():
            before, after = (sizes.get(when, {}).get(name) for when in ("before", "after"))
            if after is not None:
                rows.append([label, number(before), *[number(after)] * len(stages)])
        header = ("", "Before", *(STAGES[stage] for stage in stages))
        note = self.saves
        if quality:
            note = f"{measured_on(quality)} {note}"
        return Table(QUALITY, header, rows, note)

    def _methods(self) -> Table:
        before = self.data["quality"]["before"]
        rows = [
            [
                "dense",
                "-",
                f"{before['perplexity']:.4f}",
                f"{before['cross_entropy']:.4f}",
                "-",
                "-",
                "-",
            ]
        ]
        for run in self.data["runs"]:
            excess = run["cross_entropy"] - before["cross_entropy"]
            rows.append(
                [
                    run["method"],
                    Sparsity.parse(run["sparsity"]).label
                    if "," not in run["sparsity"]
                    else run["sparsity"],
                    number(run["perplexity"]) + percent(before["perplexity"], run["perplexity"]),
                    number(run["cross_entropy"]),
                    number(excess),
                    number(run["kl"]),
                    f"{run['seconds']:.1f}",
                ]
            )
        perplexity, cross_entropy, kl = QUALITY_HEADER
        header = ("Method", "Sparsity", perplexity, cross_entropy, EXCESS, kl, "Seconds")
        return Table(
            METHODS, header, rows, "No training. Seconds of pruning, calibration passes included."
        )

    # ---- plots ----

    def plots(self) -> dict[str, list]:
        """Section -> its figures."""
        found: dict[str, list] = {}
        if self.data.get("runs"):
            found[METHODS] = [self._excess_plot()]
        if (learned := self.data.get("distillation")) and learned["curve"]:
            x = [point["tokens"] / 1000 for point in learned["curve"]]
            y = [point["perplexity"] for point in learned["curve"]]
            lines = [Series("pruned", x, y, AFTER)]
            if level := (learned.get("parent") or {}).get("perplexity"):
                lines.append(Series("dense", x, [level] * len(x), BEFORE, style="--", marker=""))
            found[QUALITY] = [line_plot("Distillation", lines, "thousand tokens", "perplexity")]
        if all(one["error"] is not None for one in self.layers):
            names = [str(one["layer"]) for one in self.layers]
            bars = [(self.label, AFTER, [one["error"] for one in self.layers])]
            title, unit = "Error of each layer's output", "relative squared error"
            found["Layers"] = [bar_plot(title, names, bars, "layer", unit)]
        return found

    def _excess_plot(self):
        """Cross-entropy over the dense model's by sparsity, a bar a method."""
        runs, dense = self.data["runs"], self.data["quality"]["before"]["cross_entropy"]
        sparsities = list(dict.fromkeys(run["sparsity"] for run in runs))
        methods = list(dict.fromkeys(run["method"] for run in runs))
        excess = {(run["method"], run["sparsity"]): run["cross_entropy"] - dense for run in runs}
        series = [
            (method, PALETTE[index], [excess.get((method, one)) for one in sparsities])
            for index, method in enumerate(methods)
        ]
        groups = [one if "," in one else Sparsity.parse(one).label for one in sparsities]
        title = "Excess cross-entropy by method"
        return bar_plot(title, groups, series, "sparsity", "nats a token")
