"""What `effattn fit` refuses before it loads anything."""

from __future__ import annotations

import pytest
from conftest import tiny

import effattn
from effattn import embedded
from effattn.fitting.catalog import Judge
from effattn.recipes.fit import Settings, check, run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"bytes": "60%", "kv_bytes_per_token": "50%", "frontier": True},
            "frontier: got limits of bytes, kv_bytes_per_token; a curve goes along one, valid is",
        ),
        ({"tokens_per_s": "120%", "frontier": True}, "frontier: got limits of tokens_per_s; "),
        ({"bytes": "60%", "frontier": True, "recover_tokens": 9}, "recover_tokens: got 9 with"),
        ({}, "budget: got no limit"),
        ({"bytes": "60%", "allow": ("head",)}, "allow: got 'head'.*heads"),
        ({"bytes": "60%", "forbid": ("cach",)}, "forbid: got 'cach'.*cache"),
        ({"bytes": "60%", "allow": ("window",), "keep": "cache"}, "no axis is left to search"),
        ({"bytes": "60%", "keep": "wieghts"}, "keep: got 'wieghts'.*weights"),
        ({"bytes": "60 gigs"}, "bytes: unit: got 'gigs'"),
        ({"bytes": "60%", "context": 0}, "context: got 0"),
        ({"bytes": "60%", "batch": 0}, "batch: got 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        check(Settings(output=tmp_path / "out", **given))
    assert not list(tmp_path.iterdir())


def test_one_limit_makes_a_curve(tmp_path):
    for name in ("bytes", "kv_bytes_per_token", "weight_bytes", "parameters"):
        assert check(Settings(output=tmp_path / "out", frontier=True, **{name: "60%"})).given


def test_what_was_measured_serves_other_budgets(tmp_path, monkeypatch):
    """With a file for it nothing is measured again, and a run with other settings says so."""
    effattn.save(tiny("llama", vocab_size=3072), tmp_path / "parent", embedded.tokenizer())
    how = {"model": str(tmp_path / "parent"), "length": 32, "score_tokens": 64, "rounds": 1}
    how |= {"calibration_tokens": 64, "evaluation_tokens": 64, "allow": ("window",)}
    how |= {
        "retrieval_trials": 0,
        "decode_steps": 0,
        "batch": 8,
        "measured": tmp_path / "measured.json",
    }
    one = run(Settings(output=tmp_path / "one", bytes="90%", **how))
    monkeypatch.setattr(Judge, "alone", lambda *_: pytest.fail("it was measured before"))
    other = run(Settings(output=tmp_path / "other", bytes="80%", **how))
    assert other.data["candidates"] == one.data["candidates"]
    assert other.data["plan"]["predicted"] != one.data["plan"]["predicted"]
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    with pytest.raises(ValueError, match=r"settings \(score_tokens\).*delete .*measured"):
        run(Settings(output=tmp_path / "third", bytes="90%", **how | {"score_tokens": 96}))
