"""One report page of every kind, with made-up values. A new kind is a maker here and a line in
`PAGES`.
"""

from __future__ import annotations

from collections.abc import Callable

from test_conversion_report import data as conversion_data
from test_extend_recipe import data as article_data
from test_fit_report import data as fit_data
from test_measure_report import data as measure_data
from test_quantize_report import data as quantize_data
from test_tuned_rules import made

from effattn.arena.report import ArenaReport
from effattn.exporting.report import ExportReport
from effattn.extending.article_report import ArticleReport
from effattn.extending.report import ExtendReport
from effattn.fitting.report import FitReport
from effattn.heads.mla.report import MlaReport
from effattn.heads.report import ConversionReport, compare_html
from effattn.linearizing.approximation_report import ApproximationReport
from effattn.linearizing.report import LinearizeReport
from effattn.measuring.report import Report as MeasureReport
from effattn.prune.shearing.report import ShearReport
from effattn.prune.structural.report import StructuredReport
from effattn.prune.unstructured.report import OneShotReport
from effattn.quant.sensitivity.report import QuantizeReport
from effattn.rehosting.report import RehostReport
from effattn.reports.page import Section, page
from effattn.reports.plots import (
    AFTER,
    BEFORE,
    UPTRAINED,
    RooflinePoint,
    Series,
    line_plot,
    roofline_plot,
    stacked_bar_plot,
)
from effattn.reports.tables import Table, pairs
from effattn.swapping.report import SwapReport


def conversion() -> str:
    return ConversionReport(conversion_data()).to_html()


def sweep() -> str:
    return compare_html(
        [
            ConversionReport(conversion_data(kv, method))
            for kv in (4, 2)
            for method in ("mean", "first")
        ]
    )


def mla() -> str:
    """Whose report has the entries of a conversion to latents."""
    made = conversion_data()
    made["kind"] = MlaReport.kind
    made["settings"] |= {"rank": 24, "rope_dim": 8}
    for index, row in enumerate(made["layers"]):
        row |= {"rank": 24, "lost": 0.01 * index}
    return MlaReport(made).to_html()


def fit() -> str:
    return FitReport(fit_data()).to_html()


def swap() -> str:
    def stream(perplexity: float) -> dict:
        spans = [
            {"first": first, "last": last, "perplexity": perplexity + first, "cross_entropy": 2.0}
            for first, last in ((0, 128), (128, 512), (512, 2000))
        ]
        return {
            "tokens": 2000,
            "seconds": 1.5,
            "spans": spans,
            "buckets": spans,
            "cache_bytes": [[128, 1 << 18], [512, 1 << 20], [2000, 1 << 22]],
        }

    def run(label: str, role: str, perplexity: float) -> dict:
        contexts = [
            {"context": c, "perplexity": perplexity + c, "seconds": 0.5}
            for c in (128, 256, 512, 1024)
        ]
        text = {"tokens": 3, "within": "def f(x):\n", "past": "    return <x>\n", "seconds": 1.0}
        return {
            "label": label,
            "role": role,
            "pattern": label,
            "contexts": contexts,
            "stream": stream(perplexity),
            "text": text,
            "layers": [label, label],
        }

    settings = {
        "model": "some-model",
        "patterns": ["sliding(window=64, sinks=4)"],
        "chunk": 64,
        "stream_tokens": 2000,
        "evaluation_tokens": 4096,
        "prompt_tokens": 100,
        "generate_tokens": 50,
        "temperature": 0,
        "seed": 1,
        "text": "a" * 300,
    }
    runs = [
        run("dense (before)", "before", 90.0),
        run("sliding(window=64, sinks=4)", "pattern", 20.0),
        run("sliding(window=64)", "baseline", 25.0),
    ]
    proof = {
        "max_logit_difference": 0.0,
        "tokens": 256,
        "patterns_after_loading": ["sliding(window=64, sinks=4)"],
    }
    return SwapReport(
        {
            "kind": "swap_backend",
            "settings": settings,
            "model": {"class": "Llama", "trained_length": 512},
            "runs": runs,
            "reference": {
                "context": 512,
                **{k: v for k, v in stream(18.0).items() if k != "cache_bytes"},
            },
            "prompt": {"text": "import os\n" * 9, "tokens": 100},
            "verification": proof,
            "environment": {"torch": "2.99"},
        }
    ).to_html()


def measure() -> str:
    return MeasureReport(measure_data()).to_html()


def linearize() -> str:
    def quality(perplexity: float) -> dict:
        return {"perplexity": perplexity, "cross_entropy": 2.0, "kl": 0.1}

    curve = [
        {"tokens": tokens, **quality(1e6 / (tokens + 1e4))} for tokens in (0, 100_000, 200_000)
    ]
    layers = [
        {
            "layer": i,
            "pattern": "linear(decay=[" + "0.99609375, " * 8 + "])",
            "projections": "dense",
        }
        for i in (0, 1)
    ]
    return LinearizeReport(
        {
            "kind": "linearize",
            "layers": layers,
            "pretraining_tokens": 12_000_000,
            "verification": {"tokens": 64},
            "settings": {
                "model": "some-model",
                "pattern": "linear",
                "projections": None,
                "keep_every": 0,
                "keep": "dense",
            },
            "model": {"class": "Llama", "parameters_before": 10, "parameters_after": 12},
            "environment": {"torch": "2.99"},
            "quality": {
                "before": quality(17.0),
                "tokens": 4096,
                "context": 512,
                "source": "some text",
            },
            "stages": {
                stage: quality(value) for stage, value in (("swap", 90.0), ("transfer", 30.0))
            },
            "transfer": {"tokens": 1000, "before": [0.5, 0.7], "after": [0.1, 0.2]},
            "distillation": {"tokens": 2000, "curve": curve, "parent": quality(17.0)},
            "state_bytes": [
                {"context": c, "plain": 8192 * c, "ours": 400_000} for c in (1024, 8192, 65536)
            ],
        }
    ).to_html()


def quantize() -> str:
    return QuantizeReport(quantize_data()).to_html()


def approximation() -> str:
    cost = {"flops": 5, "dense_flops": 10, "state_bytes": 3, "dense_state_bytes": 9}
    rows = [
        {
            "method": method,
            "option": "rounds",
            "budget": budget,
            "inputs": name,
            "error": 1 / (1 + place),
            **cost,
        }
        for method, budgets in (("lsh", (1, 2, 4)), ("linear", ("elu", "relu")))
        for place, budget in enumerate(budgets)
        for name in ("layer 0", "layer 1", "N(0, 1)")
    ]
    matrices = [
        {"matrix": name, "ratio": ratio, "kept": ratio, "error": 1 - ratio}
        for name in ("Gaussian", "q")
        for ratio in (0.25, 0.5)
    ]
    facts = {"class": "Llama", "tokens": 512}
    made = {
        "kind": "approximation",
        "model": facts,
        "rows": rows,
        "matrices": matrices,
        "environment": {"torch": "2"},
    }
    return ApproximationReport(made).to_html()


def shear() -> str:
    def quality(perplexity: float) -> dict:
        return {"perplexity": perplexity, "cross_entropy": 2.0, "kl": 0.1}

    def training(tokens: int, masked: bool) -> dict:
        points = [
            {"step": i, "tokens": i * tokens // 2, "losses": [3.0 - i, 2.5], "weights": [0.7, 0.3]}
            for i in range(3)
        ]
        shares = (
            {"removed": {"heads": 0.1, "ffn": 0.2}, "target": {"heads": 0.5, "ffn": 0.5}}
            if masked
            else {}
        )
        return {
            "tokens": tokens,
            "domains": ["code", "prose <b>"],
            "references": [1.5, 2.0],
            "target": {"heads": 4, "ffn": 352},
            "record": [point | shares for point in points],
        }

    sizes = {
        "parameters": 4_000_000,
        "layer_parameters": 3_000_000,
        "file_bytes": None,
        "kv_bytes_per_token": 8192,
        "flops_per_token": 7e6,
    }
    row = {"cut": quality(90.0), "continued": quality(30.0), "training": training(200_000, False)}
    return ShearReport(
        {
            "kind": "shear",
            "settings": {
                "model": "some-model",
                "heads": 4,
                "distill": True,
                "domains": ["a.txt", "b"],
            },
            "target": {"hidden": [256, 256], "heads": [8, 4], "ffn": [704, 352], "layers": [4, 4]},
            "model": {"class": "Llama"},
            "size": {"before": sizes, "after": sizes | {"parameters": 2_400_000}},
            "quality": {
                "before": quality(17.0),
                "cut": quality(40.0),
                "recovered": quality(25.0),
                "continued": quality(21.0),
                "tokens": 4096,
                "context": 512,
                "source": "some text",
            },
            "masks": training(100_000, True),
            "recovered": training(50_000, False),
            "continued": training(100_000, False),
            "baselines": {
                "scratch": row,
                "taught": row | {"criterion": {"heads": "obs", "ffn": "obs"}},
            },
            "speed": [{"what": "reading 512 tokens", "before": 9e3, "after": 1.5e4}],
            "verification": {"tokens": 64},
            "pretraining_tokens": 12_000_000,
            "environment": {"torch": "2.99"},
        }
    ).to_html()


def prune_oneshot() -> str:
    def quality(perplexity: float) -> dict:
        return {"perplexity": perplexity, "cross_entropy": perplexity / 10, "kl": 0.1}

    linear = {
        "name": "self_attn.q_proj",
        "shape": [64, 64],
        "zeros": 2048,
        "loss": 1.5,
        "damping": 0.01,
    }
    layers = [
        {
            "layer": i,
            "sparsity": "0.5",
            "weights": 4096,
            "zeros": 2048,
            "error": 0.01 + i,
            "seconds": 1.5,
            "linears": [linear],
        }
        for i in range(3)
    ]
    runs = [
        {
            "method": method,
            "sparsity": sparsity,
            "seconds": 2.5,
            "errors": [0.1, None],
            **quality(30.0),
        }
        for sparsity in ("0.5", "2:4", "0.5, <0.4>")
        for method in ("sparsegpt", "wanda", "magnitude")
    ]
    sizes = {"parameters": 4_000_000, "nonzero_parameters": 2_400_000, "weight_bytes": 16_000_000,
             "file_bytes": 16_004_000, "kv_bytes_per_token": 8192, "flops_per_token": 8_000_000,
             "flops_of_nonzeros": 4_800_000}  # fmt: skip
    curve = [{"tokens": tokens, **quality(22.0 - tokens / 1e5)} for tokens in (0, 100_000, 200_000)]
    timed = {"tokens_per_s": 100.0, "kv_bytes": 1 << 20}
    return OneShotReport(
        {
            "kind": "prune_oneshot",
            "settings": {"model": "some-model", "method": "sparsegpt", "sparsity": "0.5"},
            "model": {"class": "Llama"},
            "layers": layers,
            "sizes": {"before": sizes, "after": sizes},
            "runs": runs,
            "quality": {
                "tokens": 4096,
                "context": 512,
                "source": "some text",
                "before": quality(20.0),
                "pruned": quality(22.0),
                "distilled": quality(20.5),
            },
            "distillation": {"tokens": 200_000, "curve": curve, "parent": {"perplexity": 20.0}},
            "decode": [{"context": 512, "before": timed, "after": {"does_not_fit": 1 << 40}}],
            "verification": {"max_logit_difference": 0.0},
            "environment": {"torch": "2.99"},
        }
    ).to_html()


def extend() -> str:
    names = {"name": "yarn", "spec": "yarn(length=4096)", "tuning": "helps", "plain": True}
    taken = names | {"predicts": "4 dimensions kept", "refused": ""}
    refused = {
        **taken,
        "name": "pi",
        "spec": "pi(length=4096)",
        "refused": "changed already, by <linear>",
    }
    plan = {
        "trained": 512,
        "target": 4096,
        "factor": 8.0,
        "base": 1e4,
        "dims": 32,
        "own": "default",
        "turned": 16,
        "length_law": 512.0,
        "wavelengths": [6.28 * 1.8**i for i in range(16)],
        "candidates": [taken, refused],
        "recommended": taken,
        "reason": "it is plain",
    }
    quality = [
        {
            "stage": stage,
            "lengths": [
                {"length": n, "cross_entropy": 2.9, "perplexity": 18.0, "accuracy": 0.4}
                for n in (512, 4096)
            ],
        }
        for stage in ("before", "after tuning")
    ]
    losses = [{"tokens": 1000 * i, "loss": 4.0 - i / 10} for i in range(1, 9)]
    return ExtendReport(
        {
            "kind": "extend",
            "settings": {"model": "some-model", "to": 4096, "source": "some text"},
            "plan": plan,
            "rule": {"spec": "yarn(length=4096)", "plain": True},
            "model": {"class": "Llama"},
            "quality": quality,
            "tuning": {"tokens": 8000, "window": 512, "losses": losses},
            "verification": {"max_logit_difference": 0.0},
            "environment": {"torch": "2.99"},
        }
    ).to_html()


def extend_context() -> str:
    tuned = {"tokens": 200, "rules": made(pi=(4.0, 3.0, 2.5), ntk=(3.0, 2.9, 2.8)), "reach": []}
    return ArticleReport(article_data() | {"tuned": tuned}).to_html()


def structured() -> str:
    def run(criterion: str, compensation: str, excess: float) -> dict:
        return {
            "criterion": criterion,
            "compensation": compensation,
            "perplexity": 17.0,
            "kl": 0.1,
            "seconds": 9.5,
            "cross_entropy": 2.8 + excess,
        }

    sizes = {
        "layers": 9,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 32,
        "ffn": 704,
        "parameters": 4_000_000,
        "weight_bytes": 16_000_000,
        "file_bytes": 16_004_000,
        "kv_bytes_per_token": 8192,
        "flops_per_token": 7_000_000,
    }
    errors = [
        {
            "layer": i,
            "heads_error_sliced": 0.3,
            "heads_error": 0.2,
            "ffn_error_sliced": 0.1,
            "ffn_error": 0.05,
        }
        for i in range(8)
    ]
    speed = {"tokens_per_s": 100.0, "kv_bytes": 4096}
    return StructuredReport(
        {
            "kind": "prune_structured",
            "settings": {
                "model": "some-model",
                "heads": 4,
                "ffn": 528,
                "layers": 8,
                "criterion": {"heads": "taylor <b>"},
            },
            "model": {"class": "Llama"},
            "kept": {"layers": list(range(8))},
            "layers": errors,
            "importance": {
                "heads": [[1.0, 0.5, 0.25, 0.0] * 2] * 9,
                "ffn": [list(range(101))] * 9,
                "layers": [0.5] * 9,
            },
            "sizes": {
                "before": sizes,
                "after": sizes | {"heads": 4, "kv_heads": 4, "parameters": 3_000_000},
            },
            "quality": {
                "before": {"perplexity": 16.0, "cross_entropy": 2.8},
                "pruned": run("taylor", "weights", 0.1),
                "tokens": 4096,
                "context": 512,
                "source": "some text",
            },
            "runs": [
                run(name, kind, 0.1)
                for name in ("taylor", "random")
                for kind in ("weights", "nothing")
            ],
            "decode": [{"context": 512, "before": speed, "after": speed}],
            "verification": {"fresh_process": True},
            "environment": {"torch": "2.99"},
        }
    ).to_html()


UNITS = [  # label, time, size, count, ratio; in the order of each column ascending: ORDER
    ["b", "1.2 s", "2.0 GiB", "4,096", "9.20x"],
    ["a", "12.3 ms", "900.0 KiB", "512", "10.1x (+5 %)"],
    ["c", "not measured", "does not fit: needs 9.0 GiB", "16k", "not measured"],
    ["d", "450 µs", "1.2 MiB", "<= 70,000", "-"],
    ["e", "2 min", "12 B", "1e6", "-0.5x"],
]
# labels ascending by each column; unknown last, in the order they had
ORDER = ["abcde", "dabec", "eadbc", "abcde", "ebadc"]


def plots() -> str:
    contexts, names = [1024, 4096, 16384], ["dense", "sliding(window=512)", "linear"]
    lines = [
        Series(name, contexts, [3, 4 + i, None if i else 40], color)
        for i, (name, color) in enumerate(zip(names, (BEFORE, AFTER, UPTRAINED), strict=True))
    ]
    points = [
        RooflinePoint("dense, decode", 0.5, 5e9, BEFORE),
        RooflinePoint("dense, prefill", 190, 9e10, BEFORE, "s"),
    ]
    parts = [("weights", AFTER, [40.0, 40.0, 40.0]), ("KV", BEFORE, [128.0, 4.0, None])]
    speed = Table(
        "Units",
        ("Variant", "Time", "Memory", "Context", "Against dense"),
        UNITS,
        "Made-up values.\n" * 2,
    )
    drawn = [
        line_plot("Time", lines, "context (tokens)", "time (ms)", contexts=True, log_y=True),
        roofline_plot("Roofline", points, 14e9, {"float32": 118e9}),
        stacked_bar_plot(
            "Bytes", names, parts, "MiB", "variant", horizontal=True, totals=["168", "44", "40"]
        ),
    ]
    sections = [Section("Plots", "A note.", drawn, [speed])]
    return page(
        "A title",
        "The finding.",
        [*sections, *(Section(n, tables=[pairs(n, {"a": 1})]) for n in "ABCD")],
    )


def export() -> str:
    check = {"engine": "llama.cpp (xllamacpp 1.0)", "tokens": 320, "equal_tokens": 319, "kl": 1e-5}
    speeds = [{"context": context, "before": 5.4, "after": 6.9} for context in (512, 4096)]
    data = {
        "kind": "export",
        "settings": {"model": "runs/gqa2", "to": "gguf", "format": "f16", "before": "embedded"},
        "files": {"model.gguf": 8 << 20, "tokenizer_config.json": 272},
        "weight_bytes": 9 << 20,
        "notes": ["30 packed matrices are dense, with their zeros"],
        "check": check,
        "speeds": speeds,
        "environment": {"device": "CPU"},
    }
    return ExportReport(data).to_html()


def rehost() -> str:
    sides = {
        side: {"class": f"{name}ForCausalLM", "model_type": name.lower(), "parameters": 10**6}
        for side, name in (("before", "GPTNeoX"), ("after", "Llama"))
    }
    data = {
        "kind": "rehost",
        "settings": {"model": "runs/neox"},
        "model": sides | {"dtype": "float32"},
        "logits": {"max_difference": 1e-5, "max": 12.0, "kl": 1e-9, "tokens": 512},
        "verification": None,
        "environment": {"device": "CPU"},
    }
    return RehostReport(data).to_html()


def arena() -> str:
    rows = [
        {
            "task": task,
            "pattern": pattern,
            "pretraining": before,
            "accuracy": 0.3 + place / 10,
            "error": 0.01,
            "loss": 1.5,
            "majority": 0.2,
            "parameters": 100_000,
            "seconds": 10.0 + place,
            "ms": 30.0 + place,
            "peak_bytes": (20 + place) << 20,
            "tokens": 144,
        }
        for task in ("listops", "pathfinder_images")
        for place, (pattern, before) in enumerate(
            [("linear", 0), ("dense", 0), ("sliding(window=17)", 0), ("linear", 100)]
        )
    ]
    data = {
        "kind": "lra",
        "settings": {"steps": 100, "batch": 32},
        "model": {"width": 64, "layers": 2, "heads": 4},
        "rows": rows,
        "environment": {"device": "a CPU", "threads": 1},
    }
    return ArenaReport(data).to_html()


# name -> (maker of the HTML, its number of plots)
PAGES: dict[str, tuple[Callable[[], str], int]] = {
    "prune_oneshot": (prune_oneshot, 3),
    "conversion": (conversion, 5),
    "mla": (mla, 5),
    "fit": (fit, 6),
    "sweep": (sweep, 4),
    "swap": (swap, 3),
    "plots": (plots, 3),
    "measure": (measure, 9),
    "linearize": (linearize, 4),
    "approximation": (approximation, 3),
    "quantize": (quantize, 7),
    "shear": (shear, 5),
    "structured": (structured, 5),
    "extend": (extend, 2),
    "extend_context": (extend_context, 6),
    "export": (export, 0),
    "rehost": (rehost, 0),
    "arena": (arena, 4),
}
