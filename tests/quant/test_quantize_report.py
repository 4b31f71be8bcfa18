"""The report of quantized caches: the same numbers in every form, and what is missing is said."""

from __future__ import annotations

import copy
import json
import math

import pytest

from effattn.quant.sensitivity.report import QuantizeReport

NAMES = ["full", "int8", "int2(group=16, residual=64)", "plan"]


def quality(kl: float) -> dict:
    """What one cache does to the text."""
    return {
        "tokens": 4096,
        "length": 512,
        "cross_entropy": 2.8 + kl,
        "perplexity": 16.4 + kl,
        "kl": kl,
        "parent_cross_entropy": 2.8,
        "parent_perplexity": 16.4,
        "loss_error": kl / 9,
        "agreement": 1 - kl,
        "held_tokens": 512,
        "held_bytes": 9,
    }


def format_row(place: int, name: str, kl: float) -> dict:
    """A format's row, each of a third of the bytes of the one before."""
    return {
        "name": name,
        "cache": None if name == "full" else name,
        "adapted": "groups of 32" if place else "",
        "quality": quality(kl),
        "bytes_per_token": 8192 / 3**place,
        "held": [{"tokens": 512, "predicted": 1000, "held": 1000, "allocated": 1000}],
        "memory": [{"context": n, "bytes": n * 8192 // 3**place} for n in (4096, 32768, 131072)],
    }


def depth_row(depth: float) -> dict:
    """Retrieval from one depth of the text."""
    return {
        "depth": depth,
        "trials": 8,
        "exact": depth,
        "token_accuracy": depth,
        "choice": None,
        "nats": 2 - depth,
        "learned": depth > 0.4,
    }


def time_row(tokens: int, batch: int, name: str) -> dict:
    """Decoding steps over one cache."""
    return {
        "context": tokens,
        "batch": batch,
        "lane": name,
        "ms": tokens / 99,
        "ms_p20": tokens / 100,
        "ms_p80": tokens / 98,
        "rounds": 9,
        "tokens_per_s": 50.0,
        "kv_bytes": tokens,
    }


def layer_row(layer: int, place: int, spec: str) -> dict:
    """One layer alone in one format."""
    return {
        "layer": layer,
        "spec": spec,
        "kl": 10.0 ** -(place + layer),
        "perplexity": 17.0,
        "agreement": 0.99,
    }


def data() -> dict:
    """A report's, as the job makes it."""
    depths = [depth_row(depth) for depth in (0.1, 0.5, 0.9)]
    return {
        "kind": "quantize_kv",
        "formats": [
            format_row(place, name, kl)
            for place, (name, kl) in enumerate(zip(NAMES, (1e-9, 1e-4, 0.02, 3e-4), strict=True))
        ],
        "retrieval": [
            {"lane": name, "task": task, "packed": 64, "chance": 0.0, "rows": depths}
            for task in ("passkey", "associative recall")
            for name in NAMES
        ],
        "decode": [
            time_row(tokens, batch, name)
            for tokens in (512, 4096)
            for batch in (1, 4)
            for name in NAMES
        ],
        "saved": {"0-3": "int8"},
        "settings": {
            "model": "some-model",
            "formats": NAMES[1:3],
            "sensitivity_tokens": 2048,
            "retrieval_length": 384,
        },
        "model": {"class": "Llama", "weights": "nf4", "weight_bytes": 5_000_000},
        "environment": {"torch": "2.99"},
        "sensitivity": [
            layer_row(layer, place, spec)
            for layer in range(4)
            for place, spec in enumerate(NAMES[1:3], 2)
        ],
        "plan": {
            "budget": 1500.0,
            "specs": ["int8"] * 4,
            "cache": {"0-3": "int8"},
            "bytes_per_token": 1444.0,
            "kl": 1e-4,
        },
        "frontier": [{"bytes_per_token": 700.0 * n, "kl": 0.1**n} for n in range(1, 9)],
        "verification": {"tokens": 256, "caches_after_loading": ["int8"] * 4},
    }


def test_every_form_says_the_same(tmp_path):
    report = QuantizeReport(data())
    assert "int8 3.00x smaller, perplexity +0.01 %" in report.headline
    assert report.swap_call == "effattn.swap(model, cache={'0-3': 'int8'})"
    report.save(tmp_path)
    assert QuantizeReport.load(tmp_path).data == json.loads(report.to_json())
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for table in report.tables():
        assert table.title in page
        for cell in (cell for row in table.rows for cell in row):
            assert cell.replace("'", "&#39;") in page
            assert cell in text
    assert "associative recall at 0.1" in text, "what the model has not learned"
    with pytest.raises(ValueError, match="got 'linearize'"):
        QuantizeReport({"kind": "linearize"})


def test_what_is_missing_or_not_finite_is_said():
    made = data()
    ruined = made["formats"][2]["quality"]
    ruined |= {"cross_entropy": math.nan, "perplexity": math.inf, "kl": math.nan}
    made["decode"] = [*made["decode"], {"context": 65536, "batch": 4, "does_not_fit": 2**40}]
    made["retrieval"] = [
        row if row["task"] == "passkey" else row | {"rows": [], "reason": "no words of one token"}
        for row in made["retrieval"]
    ]
    report = QuantizeReport(json.loads(QuantizeReport(made).to_json()))
    text = report.to_markdown()
    for said in (
        "perplexity not finite",
        "65,536 tokens x 4: not measured, needs 1.0 TiB",
        "associative recall: not measured, no words of one token",
    ):
        assert said in text
    assert report.to_html()
    bare = copy.deepcopy(made) | {
        "plan": None,
        "sensitivity": [],
        "retrieval": [],
        "decode": [],
        "verification": None,
    }
    bare["frontier"] = []
    assert "Plan" not in [table.title for table in QuantizeReport(bare).tables()]
    assert QuantizeReport(bare).to_html()
