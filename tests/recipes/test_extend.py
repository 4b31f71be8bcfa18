"""What each rule promises a model, and a checkpoint with one, tuned or not, by the whole job and
its report.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import effattn
from effattn.errors import Unsupported
from effattn.extending import planner
from effattn.extending.report import ExtendReport
from effattn.hf import anatomy
from effattn.patterns.dense import Dense
from effattn.positions.extrapolation import critical_dimension, extrapolation_limit
from effattn.recipes import extend as jobs
from effattn.recipes.cli import app
from effattn.recipes.extend import Settings
from effattn.surgery.describing import describe


def small(**given):
    """A random model with the embedded model's vocabulary, made for 128 tokens."""
    return tiny(
        "llama",
        dtype=torch.float32,
        vocab_size=3072,
        num_attention_heads=2,
        num_key_value_heads=2,
        **given,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model"
    effattn.save(small(), path, effattn.embedded.tokenizer())
    return path


# ---- the plan
# -------------------------------------------------------------------------------------------------


def test_the_plan_is_what_the_formulas_say():
    plan = planner.make_plan(small(), 1024)  # heads of 32 dimensions
    assert (plan.trained, plan.factor, plan.dims, plan.base, plan.own) == (
        128,
        8.0,
        32,
        10000.0,
        "default",
    )
    assert plan.turned == critical_dimension(10000.0, 32, 128)
    assert sum(one <= 128 for one in plan.wavelengths) * 2 == plan.turned
    assert plan.wavelengths[0] == pytest.approx(2 * math.pi)
    assert "base 10,000 -> 91,896" in plan.candidate("ntk").predicts
    assert plan.candidate("ntk(length=1024)") is plan.candidate("ntk")
    base = planner.base_for(planner.of_model(small()), 1024, plan.turned)
    assert extrapolation_limit(10000.0, 32, 128, base, 128) >= 1024
    assert extrapolation_limit(10000.0, 32, 128, 0.95 * base, 128) < 1024
    assert f"base={base:.0f}" in plan.candidate("abf").spec
    assert plan.candidate("abf").tuning == plan.candidate("pi").tuning == "needed"
    assert plan.candidate("nothing") is None
    assert json.loads(json.dumps(plan.to_dict()))["recommended"]["name"] == "rerope"


def test_yarns_ramp_is_counted_as_it_is():
    plan = planner.make_plan(small(), 512)
    ratio = (planner.of_model(small()).thetas() / _yarn(512).rotary_emb.inv_freq).tolist()
    kept, divided = (
        sum(abs(one - 1) < 1e-4 for one in ratio),
        sum(abs(one - 4) < 1e-3 for one in ratio),
    )
    mixed = 16 - kept - divided
    said = f"{2 * kept} dimensions kept, {2 * mixed} mixed, {2 * divided} divided by 4"
    assert plan.candidate("yarn").predicts.startswith(said)
    assert kept + divided < 16


def _yarn(length):
    return effattn.swap(small(), positions=f"yarn(length={length})").model


def test_what_is_recommended_depends_on_tuning():
    plan = planner.make_plan(small(), 1024)
    assert plan.recommended.spec == "rerope(window=48)"
    assert not plan.recommended.plain
    assert "without fine-tuning" in plan.reason
    tuned = planner.make_plan(small(), 1024, tuned=True)
    assert tuned.recommended.spec == "yarn(length=1024)"
    assert tuned.recommended.plain


def test_every_candidate_is_a_rule_that_the_model_takes(tokens):
    plan, model = planner.make_plan(small(), 1024), small()
    plain = {}
    for one in plan.candidates:
        assert one.refused == ""
        effattn.swap(model, positions=one.spec)
        plain[one.name] = effattn.surgery.swapping.active(model) is None
        assert torch.isfinite(model(tokens[None, :200]).logits).all()
        effattn.restore(model)
    assert plain == {one.name: one.plain for one in plan.candidates}
    leak = plan.candidate("leaky_rerope").spec
    k = int(leak.partition("k=")[2].rstrip(")"))
    assert 32 + (1024 - 32) / k <= 64 < 32 + (1024 - 32) / (k / 2)


@pytest.mark.parametrize(("kind", "plain"), [("gemma3_text", True), ("gemma2", False)])
def test_the_plan_says_which_layers_a_rule_goes_to(kind, plain):
    model = tiny(kind)  # layer 0 has a window of its own
    plan = planner.make_plan(model, 1024, tuned=True)
    assert (plan.layers, plan.depth) == ([1], 2)
    assert plan.candidate("yarn").plain == plain  # gemma2: one set of parameters for all layers
    assert plan.reason.endswith("the checkpoint is plain transformers") == plain
    rule = {"spec": "yarn(length=1024)", "plain": plain}
    settings = Settings(to=1024, tune_tokens=1024, output="unused")
    if not plain:
        with pytest.raises(ValueError, match=r"valid is 'none' \(windows of the target length\)$"):
            jobs.training_window(settings, plan, **rule)
    data = {"kind": "extend", "settings": {"model": kind}, "plan": plan.to_dict(), "rule": rule}
    report = ExtendReport(data | {"quality": [], "tuning": None})
    assert "Rules go to layers 1 of 2;" in report._rules().note
    assert ("layers that a rule goes to", "1 of 2") in report._rotation().rows
    everywhere = planner.make_plan(small(), 1024)
    assert everywhere.layers == [0, 1]
    told = ExtendReport(data | {"plan": everywhere.to_dict(), "quality": [], "tuning": None})
    assert "Rules go to" not in told._rules().note


def test_a_model_with_a_rule_already_can_only_clip():
    plan = planner.make_plan(effattn.swap(small(), positions="yarn(factor=2)"), 1024)
    assert plan.trained == 128, (
        "the swap is undone or on top: the trained length is the model's own"
    )
    scaled = small(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    plan = planner.make_plan(scaled, 1024)
    assert plan.own == "linear"
    assert {one.name for one in plan.candidates if not one.refused} == {
        "rope",
        "rerope",
        "leaky_rerope",
    }
    assert "changed already" in plan.candidate("yarn").refused
    assert plan.recommended.name == "rerope"
    assert "(linear)" in planner.make_plan(scaled, 1024, tuned=True).reason


def test_mixed_models_are_planned_by_a_layer_that_turns():
    assert planner.make_plan(tiny("smollm3", no_rope_layers=[0, 1]), 1024).dims == 8
    gemma = tiny("gemma3_text")
    layer = next(one for one in anatomy.of(gemma).layers if one.window is None)
    assert planner.of_model(gemma).dims == layer.rotary_dims


# ---- bad input
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": 128}, "to: got 128, the model was trained at 128 tokens; valid is more than that"),
        ({"to": 0}, "to: got 0, valid is a whole number of at least 1"),
        ({"rule": "yarm(length=512)"}, "did you mean 'yarn'"),
        ({"rule": "pi(factor=0.5)"}, "pi: factor: got 0.5, valid is a number of at least 1"),
        ({"rule": "leaky_rerope(window=64, k=0.5)"}, "k: got 0.5"),
        ({"rule": "yarn(length=64)"}, "shorter than the 128 tokens"),
        ({"tune_tokens": 100}, "tune_tokens: given without output"),
        ({"lora": 4}, "lora: got 4 without tune_tokens"),
        ({"sampling": "posse"}, "did you mean 'pose'"),
        (
            {"rule": "rerope", "tune_tokens": 100, "output": "x"},
            "counts positions by itself; valid is 'none'",
        ),
        (
            {"window": 1000, "tune_tokens": 100, "output": "x"},
            "window: got 1000, valid is at most the target",
        ),
        ({"sequences": 10**6, "output": "x"}, "validation split has"),
    ],
)
def test_bad_input_is_refused_before_anything(folder, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        jobs.run(dataclasses.replace(Settings(model=str(folder), to=512), **change))
    assert list(tmp_path.iterdir()) == []


def test_models_without_rotary_positions_are_refused():
    with pytest.raises(Unsupported, match="has no rotary positions to extend"):
        planner.make_plan(tiny("opt"), 1024)


# ---- the job
# -------------------------------------------------------------------------------------------------


def test_without_an_output_it_only_plans(folder, monkeypatch):
    monkeypatch.setattr("effattn.textdata.streams", None)  # no text is read
    report = jobs.run(Settings(model=str(folder), to=512))
    assert report.data["quality"] == []
    assert "rerope(window=48)" in report.headline
    assert "Fine-tuning: not needed." in report.headline
    assert (
        "NEEDS fine-tuning: give --tune-tokens"
        in jobs.run(Settings(model=str(folder), to=512, rule="pi")).headline
    )
    assert (
        "as asked for. Nothing is known"
        in jobs.run(Settings(model=str(folder), to=512, rule="nope")).headline
    )


def test_a_rule_is_written_as_a_checkpoint(folder, tmp_path):
    report = jobs.run(Settings(model=str(folder), to=256, output=tmp_path / "far", sequences=1))
    again = effattn.load(tmp_path / "far")
    assert {row["positions"] for row in describe(again).layers} == {"rerope(window=48)"}
    stages = [row["stage"] for row in report.data["quality"]]
    assert stages == ["before", "with the rule"]
    for row in report.data["quality"]:
        assert [cell["length"] for cell in row["lengths"]] == [128, 256]
        assert all(0 < cell["cross_entropy"] < 20 for cell in row["lengths"])
    own = small()
    ids = effattn.embedded.tokens("validation", 257)
    found = effattn.evaluate.by_position(own, ids[None])["cross_entropy"]
    assert report.data["quality"][0]["lengths"][1]["cross_entropy"] == pytest.approx(
        found, rel=1e-4
    )
    assert ExtendReport.load(tmp_path / "far").data["rule"] == {
        "spec": "rerope(window=48)",
        "plain": False,
    }
    with pytest.raises(ValueError, match="kind: got 'x'"):
        ExtendReport({"kind": "x"})


def test_tuning_learns_and_the_checkpoint_is_plain(folder, tmp_path):
    steps = 6
    job = Settings(
        model=str(folder),
        to=512,
        output=tmp_path / "tuned",
        tune_tokens=steps * 128,
        lr=3e-3,
        sequences=1,
    )
    report = jobs.run(job)
    assert report.data["rule"] == {"spec": "yarn(length=512)", "plain": True}
    found = report.data["tuning"]
    assert (found["tokens"], found["steps"], found["window"], found["sampling"]) == (
        768,
        6,
        128,
        "pose",
    )
    ruled, tuned = (row["lengths"][1]["cross_entropy"] for row in report.data["quality"][1:])
    assert tuned < ruled - 0.1
    assert found["losses"][-1]["loss"] < found["losses"][0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.max_position_embeddings == 512
    assert "effattn" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert not job.partial.exists()
    assert "It was tuned on 768 tokens." in report.headline
    assert {"Tuning", "Checkpoint, loaded again"} <= {table.title for table in report.tables()}


def test_rules_that_count_by_themselves_are_tuned_on_whole_windows_by_lora(folder, tmp_path):
    pytest.importorskip("peft")
    report = jobs.run(
        Settings(
            model=str(folder),
            to=256,
            rule="rerope(window=48)",
            output=tmp_path / "lora",
            lora=2,
            tune_tokens=512,
            sampling="none",
            sequences=0,
        )
    )
    assert (report.data["tuning"]["window"], report.data["tuning"]["lora"]) == (256, 2)
    before, after = small().state_dict(), effattn.load(tmp_path / "lora").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("_proj" in name and "mlp" not in name for name in changed)


@pytest.mark.slow
def test_tuning_in_segments_that_remember(folder, tmp_path):
    """Transformer-XL's way: the pattern is gone afterwards, the rule stays, and so does the memory
    of no training."""
    job = Settings(
        model=str(folder),
        to=256,
        output=tmp_path / "tuned",
        memory="block(block=32, look_back=1)",
        sampling="none",
        window=32,
        tune_tokens=256,
        sequences=0,
    )
    found = jobs.run(job).data["tuning"]
    assert (found["window"], found["steps"], found["memory"]) == (32, 8, job.memory)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert "effattn" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    before = small().state_dict()
    assert all(not torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_what_no_memory_is_tuned_with(folder, tmp_path):
    job = Settings(
        model=str(folder),
        to=256,
        memory="block(block=32, look_back=1)",
        sampling="none",
        tune_tokens=256,
        sequences=0,
        output=tmp_path / "refused",
    )
    mistakes = {
        "memory: got 'dense', which remembers every token": {"memory": "dense"},
        "with sampling='pose', and its positions count on": {"sampling": "pose"},
        "without tune_tokens; valid is a budget": {"tune_tokens": 0},
        "which counts positions by itself; valid is a rule": {"rule": "rerope(window=8)"},
    }
    for message, change in mistakes.items():
        with pytest.raises(ValueError, match=message):
            jobs.run(dataclasses.replace(job, **change))


def test_what_cannot_be_tuned_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    effattn.save(small(attention_dropout=0.25), tmp_path / "dropout", effattn.embedded.tokenizer())
    monkeypatch.setattr(jobs, "measured", None)
    # attention that has no weights to drop, as that of a method of one's own
    monkeypatch.setattr(Dense, "extras", ())
    job = Settings(
        model=str(tmp_path / "dropout"),
        to=256,
        rule="rerope(window=48)",
        output=tmp_path / "far",
        tune_tokens=512,
        sampling="none",
    )
    with pytest.raises(Unsupported, match=r"attention dropout 0\.25"):
        jobs.run(job)
    assert not job.output.exists()
    assert not job.partial.exists()


def test_the_command_line(folder):
    done = CliRunner().invoke(
        app, ["extend", "--model", str(folder), "--to", "1k"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    for text in (
        "from 128 to 1,024 tokens",
        "rerope(window=48) (recommended)",
        "What each rule promises",
        "critical dimension",
    ):
        assert text in done.output
    refused = CliRunner().invoke(app, ["extend", "--model", str(folder), "--to", "64,128"])
    assert refused.exit_code == 2
    assert "valid is one number of tokens" in refused.output
