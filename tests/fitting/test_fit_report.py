"""What the report of a fit says."""

from __future__ import annotations

import ast
import copy

import pytest

from effattn.fitting.recovery import NOTHING
from effattn.fitting.report import CURVE, LAYERS, PLANS, SEARCH, FitReport

OWN = {
    "kv_heads": 8,
    "ffn": 704,
    "cache": "full",
    "window": None,
    "attention_weights": None,
    "ffn_weights": None,
}
TOTALS = {
    "weight_bytes": 16_000_128,
    "cache_bytes": 67_108_864,
    "bytes": 83_200_000,
    "kv_bytes_per_token": 8192,
    "parameters": 4_000_000,
}
CHANGED = OWN | {"cache": "int4(rotate='kv')", "ffn": 512, "ffn_weights": "nf4"}


def candidates() -> list[dict]:
    """Three of each of four layers."""
    return [
        {
            "layer": layer,
            "field": field,
            "value": value,
            "kl": 1e-3 * (layer + 1) * factor,
            "perplexity": 9.2,
            "agreement": 0.98,
        }
        for layer in range(4)
        for field, value, factor in (
            ("cache", "int8", 1e-3),
            ("cache", "int4(rotate='kv')", 1),
            ("ffn", 512, 4),
        )
    ]


def plan(name: str, share: float, kl: float, ms: float) -> dict:
    """A plan on held-out text."""
    return {
        "name": name,
        "bytes": TOTALS["bytes"] * share,
        "kl": kl,
        "perplexity": 9.1 + kl,
        "cross_entropy": 2.2,
        "agreement": 1 - kl,
        "passkey": 0.9,
        "recall": None,
        "ms": ms,
        "tokens_per_s": 4000 / ms,
        "timed_at": 2048,
    }


def tried(name: str, kl: float) -> dict:
    """A plan of the search."""
    return {
        "name": name,
        "round": None if name else 0,
        "bytes": 40_000_000,
        "additive": 0.9 * kl,
        "expected": 0.95 * kl,
        "kl": kl,
    }


def data() -> dict:
    """Made-up values of a plan of four layers, and of a curve."""
    smaller = {name: value // 2 for name, value in TOTALS.items()}
    return {
        "kind": "fit",
        "settings": {"model": "embedded", "axes": ["heads", "cache"], "keep": None},
        "budget": {
            "given": {"bytes": "50%"},
            "limits": {"bytes": 41_600_000},
            "context": 2048,
            "batch": 4,
        },
        "parent": TOTALS,
        "own": [OWN] * 4,
        "candidates": candidates(),
        "plan": {
            "layers": ["", "cache int4(rotate='kv'), ffn 512, ffn in nf4", "", ""],
            "harm": [0.0, 0.01, 0.0, 0.0],
            "lines": ["effattn.swap(model, cache={'1': \"int4(rotate='kv')\"})"],
            "choices": [OWN, CHANGED, OWN, OWN],
            "predicted": smaller,
            "counted": {
                "weight_bytes": smaller["weight_bytes"],
                "tokens": 1024,
                "cache_at": 1000,
                "predicted_at": 1000,
            },
            "kl": 0.001,
            "additive": 0.0009,
            "expected": 0.00095,
            "gap": 0.0,
            "factors": {"heads": 1.0, "cache": 1.1},
        },
        "tried": [tried("uniform cache int8", 0.004), tried("", 0.001)],
        "plans": [
            plan("parent", 1.0, 0.0, 20.0),
            plan("uniform cache int8", 0.5, 0.004, 25.0),
            plan("the plan", 0.5, 0.001, 24.0),
        ],
        "frontier": [
            {
                "limit": limit,
                "taken": limit - 1000,
                "kl": kl,
                "perplexity": 9.2 + kl,
                "uniform": "uniform cache int8" if limit > 3e7 else None,
                "best_uniform": 2 * kl if limit > 3e7 else None,
            }
            for limit, kl in ((2e7, 0.5), (4e7, 0.01), (6e7, 1e-5))
        ],
        "recovery": {"tokens": 1000, "curve": []},
        "verification": {"max_logit_difference": 0.0, "tokens": 64},
        "environment": {"torch": "2.99"},
    }


def test_the_headline_says_what_is_lost_and_whether_it_is_faster():
    report = FitReport(data())
    assert "KL 0.0010 nats a token, 0.25 of what uniform cache int8 has" in report.headline
    assert "0.83x as fast, which is slower here" in report.headline
    assert "unpacking what is packed costs more" in report.headline
    faster = data()
    faster["plans"][-1]["ms"] = 10.0
    assert "decodes 2.00x as fast here: a step reads 39.6 MiB instead of 79.3 MiB" in (
        FitReport(faster).headline
    )
    unknown = data()
    del unknown["plans"][-1]["ms"]
    assert "Its speed was not measured." in FitReport(unknown).headline


def test_harm_that_rounding_does_is_compared_with_nothing():
    found = data()
    found["plan"]["rounding"] = 0.0002
    told = FitReport(found).headline
    assert (
        "KL 0.0010 nats a token, which is rounding (2.00e-04 for another order of its sums)."
        in told
    )
    found["plan"]["rounding"] = 0.0005
    assert "order of its sums); so is that of uniform cache int8." in FitReport(found).headline
    found["plan"]["rounding"] = 0.00009
    assert "0.25 of what uniform cache int8 has" in FitReport(found).headline


def test_the_headline_says_what_was_recovered():
    told = data()
    told["recovery"] = {"tokens": 0, "reason": NOTHING}
    assert "There is nothing to recover: the plan changes only" in FitReport(told).headline
    told["recovery"] = {
        "tokens": 120_000,
        "curve": [{"tokens": 0, "perplexity": 12.0}, {"tokens": 120_000, "perplexity": 9.5}],
        "parent": {"perplexity": 9.25},
    }
    report = FitReport(told)
    assert (
        "on 120,000 tokens: perplexity 12.0000 to 9.5000, the parent's 9.2500." in report.headline
    )
    assert "distilled afterwards" in report.to_markdown()


def test_tables():
    report = FitReport(data())
    tables = {table.title: table for table in report.tables()}
    assert [row[0] for row in tables[PLANS].rows] == ["parent", "uniform cache int8", "the plan"]
    assert tables[PLANS].rows[1][6] == "not measured"
    assert tables[LAYERS].rows[0][1] == "as it was"
    assert "off by 5%" in tables[SEARCH].note
    assert tables[CURVE].rows[0][4] == "none fits"
    assert "predicted 1,000" in report.to_markdown()


def test_the_plan_in_words_is_code_as_it_stands():
    text = FitReport(data()).to_markdown()
    shown = text.split("**The plan in words**\n\n```text\n")[1].split("\n```")[0]
    calls = [ast.unparse(one.value.func) for one in ast.parse(shown).body]
    assert calls
    assert set(calls) <= {"effattn.swap", "effattn.shrink"}


def test_a_curve_alone():
    curve = copy.deepcopy(data())
    curve |= {"plan": None, "plans": [], "tried": [], "verification": None, "recovery": None}
    report = FitReport(curve)
    assert "3 budgets searched" in report.headline
    assert PLANS not in [table.title for table in report.tables()]
    assert report.to_html().count("<figure") == 4


def test_another_kind():
    with pytest.raises(ValueError, match="kind: got 'measure'"):
        FitReport({"kind": "measure"})
