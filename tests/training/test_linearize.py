"""Linearization: plans, fitted decays, attention transfer, the whole job and its resumption, and
error curves.
"""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf import hooks
from effattn.linearizing import plan
from effattn.linearizing.decay import GRID, fit_decays
from effattn.linearizing.inputs import exact, own_scores, projections_of
from effattn.linearizing.report import LinearizeReport
from effattn.recipes import linearize
from effattn.recipes.linearize import Settings, run
from effattn.specs import parse_spec
from effattn.training import lora
from effattn.training.transfer import AttentionTransfer, distances, learnable, transfer

CPU = {"use_cpu": True}


def swapped(pattern="linear(feature_map='hedgehog')"):
    parent = tiny("llama")
    student = copy.deepcopy(parent)
    effattn.swap(student, pattern)
    return parent, student


def test_every_nth_layer_is_kept_the_last_of_each_group():
    parts = hf.of(effattn.embedded.load()[0])
    specs = plan.layer_specs(parts, "linear", 2, "sliding(window=8)")
    assert specs == {0: "linear", 1: "sliding(window=8)", 2: "linear", 3: "sliding(window=8)"}
    assert plan.approximate(specs) == [0, 2]
    assert plan.layer_specs(parts, "linear", 0, "dense") == dict.fromkeys(range(4), "linear")
    assert plan.layer_specs(parts, None, 0, "dense") == {}
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        plan.layer_specs(parts, "liner", 0, "dense")


def test_kept_layers_learn_windows_by_head(tokens):
    model = tiny("llama")
    parts, keep = hf.of(model), "sliding(window=8, sinks=1)"
    specs = plan.layer_specs(parts, "linear", 2, keep)
    found = plan.learned(model, specs, 2, keep, 5.0, tokens[:256])
    assert found[0] == "linear"
    name, options = parse_spec(found[1])
    assert name == "sliding"
    assert len(options["window"]) == parts.layers[1].kv_heads
    assert options["sinks"] == 1
    wanted = effattn.learn_windows(
        model, tokens[:256], penalty=5.0, sinks=1, length=256, layers=[1]
    )
    assert wanted == {"1": found[1]}
    with pytest.raises(ValueError, match="layers: got 7, the model has layers 0 to 1"):
        effattn.learn_windows(model, tokens[:256], length=256, layers=[7])
    for options, message in (
        ({}, "keep_every=0 keeps no layer"),
        ({"keep_every": 2, "keep": "block(block=8)"}, "has no windows by head"),
    ):
        with pytest.raises(ValueError, match=message):
            linearize.check(Settings(pattern="linear", learn_windows=0.1, **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("granite", {"attention_multiplier": 0.05}),
        ("gemma2", {"attn_logit_softcapping": 1.0}),
    ],
)
def test_projections_are_what_the_attention_gets(tokens, kind, options):
    model = tiny(kind, **options)
    ids = tokens[:48].view(2, 24)
    q, k, v = projections_of(model, ids)[1]
    layer = hf.of(model).layers[1]
    seen = []
    handle = layer.o.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    got = exact(q, k, v, **own_scores(layer)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, seen[0], rtol=1e-4, atol=1e-5)
    assert not hasattr(layer.attention, hooks.ATTRIBUTE), "the model is as it was"
    effattn.swap(model, "dense")
    with pytest.raises(ValueError, match="restore"):
        projections_of(model, ids)


def test_fitted_decays_are_the_best_of_the_grid(tokens):
    model = tiny("llama")
    ids = tokens[:64].view(2, 32)
    fitted = fit_decays(model, {0: "linear", 1: "linear(decay=0.5)"}, ids)
    assert fitted[1] == "linear(decay=0.5)", "what the user said stays"
    same = fit_decays(model, {0: "gated(feature_map='elu')"}, ids)[0]
    assert parse_spec(same)[1]["decay"] == parse_spec(fitted[0])[1]["decay"], "gates begin there"
    chosen = parse_spec(fitted[0])[1]["decay"]
    q, k, v = projections_of(model, ids)[0]
    truth = exact(q, k, v)
    for head, decay in enumerate(chosen):
        errors = {}
        for value in GRID:
            out = effattn.backend("linear", decay=value)(q, k, v) - truth
            errors[value] = out.unflatten(1, (k.shape[1], -1))[:, head].square().sum().item()
        assert decay == min(errors, key=errors.get)


def test_transfer_sees_each_layer_alone(tokens):
    parent, student = swapped()
    ids = tokens[:64].view(2, 32)
    found = AttentionTransfer(student, parent).eval()(ids)
    # by hand, from the parent's own inputs
    for layer, theirs in zip(hf.of(student), hf.of(parent), strict=True):
        seen = []
        handle = theirs.attention.register_forward_hook(
            lambda _, a, kw, y, s=seen: s.append((kw, y[0])), with_kwargs=True
        )
        with torch.no_grad():
            parent(input_ids=ids, use_cache=False)
            handle.remove()
            got = layer.attention(**seen[0][0])[0]
        expected = (got - seen[0][1]).square().sum() / seen[0][1].square().sum()
        assert found["layers"][layer.index].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx(found["layers"].mean().item(), rel=1e-6)


@pytest.mark.parametrize("which", ["attention", "maps"])
def test_transfer_trains_what_it_says_and_brings_layers_closer(tokens, tmp_path, which):
    parent, student = swapped()
    before = {name: p.clone() for name, p in student.named_parameters()}
    found = transfer(
        student,
        parent,
        tokens,
        layers=[1],
        train_tokens=2048,
        folder=tmp_path / "t",
        length=32,
        lr=1e-3,
        trainable=which,
        overrides=CPU,
    )
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    allowed = f"layers.1.self_attn.{hooks.PATTERN}" if which == "maps" else "layers.1.self_attn"
    assert changed
    assert all(allowed in name for name in changed)
    assert found["after"][1] < found["before"][1]
    assert found["after"][0] == found["before"][0]
    assert all(p.requires_grad for p in student.parameters()), "as before"
    assert distances(student, parent, [tokens[:64].view(2, 32)])


@pytest.mark.parametrize(
    "spec",
    [
        "gated(delta=True, gate='feature')",
        pytest.param("hybrid(window=8, sinks=1)", marks=pytest.mark.slow),
    ],
)
def test_gates_and_balances_learn_in_the_transfer(spec, tokens, tmp_path):
    parent, student = swapped(spec)
    parameters = dict(hf.of(student).layers[1].attention.effattn_pattern.named_parameters())
    before = {name: p.clone() for name, p in parameters.items()}
    found = transfer(
        student,
        parent,
        tokens,
        layers=[1],
        train_tokens=2048,
        folder=tmp_path / "t",
        length=32,
        lr=1e-3,
        trainable="maps",
        overrides=CPU,
    )
    assert found["after"][1] < found["before"][1]
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items())


def test_maps_that_do_not_exist_are_refused():
    _, student = swapped("linear")
    with pytest.raises(ValueError, match="valid is 'attention'"):
        learnable(student, [0], "maps")


SMALL = {
    "transfer_tokens": 1024,
    "distil_tokens": 1024,
    "evaluation_tokens": 512,
    "length": 128,
    "overrides": CPU,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linearize") / "out"
    return run(Settings(output=folder, keep_every=4, **SMALL)), folder


def test_the_job_saves_a_checkpoint_that_loads_with_its_learned_maps(done):
    report, folder = done
    stages, verified = report.data["stages"], report.data["verification"]
    assert list(stages) == ["swap", "transfer", "distillation"]
    assert stages["transfer"]["kl"] < stages["swap"]["kl"]
    assert stages["distillation"]["kl"] != stages["transfer"]["kl"]
    assert verified["max_logit_difference"] == 0
    model = effattn.load(folder)
    patterns = [layer["pattern"] for layer in effattn.describe(model).layers]
    assert patterns[3] == "sliding(window=256, sinks=4)"
    assert all("hedgehog" in pattern and "decay=[" in pattern for pattern in patterns[:3])
    assert not folder.with_name(".out.partial").exists()
    again = LinearizeReport.load(folder)
    assert again.headline == report.headline
    for text in (again.to_html(), again.to_markdown()):
        assert "What decoding remembers" in text


def test_state_bytes_are_those_of_real_caches(done):
    report, folder = done
    row = report.data["state_bytes"][0]
    model = effattn.load(folder)
    ids = torch.randint(0, 3000, (1, row["context"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(
            input_ids=ids, use_cache=True, past_key_values=effattn.new_cache(model)
        ).past_key_values
    assert sum(layer.nbytes for layer in cache.layers) == row["ours"]
    assert row["plain"] == 4 * 8 * 2 * 32 * 4 * row["context"]


def test_a_killed_run_goes_on_and_ends_the_same(done, tmp_path, monkeypatch):
    report, folder = done
    job = Settings(output=tmp_path / "out", keep_every=4, **SMALL)
    monkeypatch.setattr(linearize, "distil", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not job.output.exists()
    assert job.partial.exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"other settings \(batch\)"):
        run(Settings(output=tmp_path / "out", keep_every=4, batch=2, **SMALL))
    again = run(job)
    assert again.data["stages"] == report.data["stages"]
    ours, theirs = (
        {n: p for n, p in effattn.load(f).named_parameters()} for f in (folder, job.output)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": None}, "pattern: got none"),
        ({"pattern": "sliding(window=8)"}, "exact in every layer"),
        ({"transfer_tokens": -1}, "transfer_tokens: got -1"),
        ({"trainable": "alle"}, "did you mean 'all'"),
        ({"pattern": "linear(feature_map='elo')"}, "did you mean 'elu'"),
        ({"length": 4}, "length: got 4"),
    ],
)
def test_bad_settings_are_one_clear_error(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(Settings(output=tmp_path / "out", **({**SMALL, **change})))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "dropout"}, r"attention dropout 0\.25"),
        ({"transfer_trainable": "maps", "pattern": "linear"}, "valid is 'attention'"),
        ({"lora": 2}, "peft is not installed"),
        ({"batch": 2}, "an unfinished run with other settings"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, change, message
):
    model = tiny("llama", dtype=torch.float32, vocab_size=3072, attention_dropout=0.25)
    effattn.save(model, tmp_path / "dropout", effattn.embedded.tokenizer())
    if change.get("model"):
        change = {"model": str(tmp_path / "dropout")}
    if change.get("lora"):
        monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    if change.get("batch"):
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.partial" / "settings.json").write_text('{"batch": 1}')
    for name in (
        "evaluate.loss.measure_parent",
        "linearizing.approximation.measure_approximation",
        "evaluate.loss.compare",
        "training.transfer.transfer",
    ):
        monkeypatch.setattr(f"effattn.{name}", None)
    with pytest.raises((ValueError, Unsupported), match=message):
        run(Settings(output=tmp_path / "out", **({**SMALL, **change})))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_is_merged_into_the_models_own_modules(tokens):
    from effattn.training.lora import adapters

    _, student = swapped()
    kinds = [type(module) for module in student.modules()]
    weight = hf.of(student).layers[0].q.module.weight.clone()
    ids = tokens[:32][None]
    with adapters(student, 4) as parameters:
        assert {p.shape for p in parameters if p.dim() == 2}
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
            expected = student(input_ids=ids).logits
    assert [type(module) for module in student.modules()] == kinds
    assert not torch.equal(hf.of(student).layers[0].q.module.weight, weight)
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_error_curves_fall_with_the_budget(tmp_path):
    report = effattn.measure_approximation(
        methods=["sliding", "performer", "vq", "monarch"], layers=[0, 3], length=128
    )
    for method in ("sliding", "vq"):
        errors = [error for _, error in report.mean(method)]
        assert errors == sorted(errors, reverse=True), method
    normal = [
        row["error"]
        for row in report.rows
        if row["method"] == "performer" and row["inputs"] == "N(0, 1)"
    ]
    assert normal[-1] < normal[0]
    gaussian = [row["error"] for row in report.data["matrices"] if row["matrix"] == "Gaussian"]
    assert gaussian == sorted(gaussian, reverse=True)
    report.save(tmp_path)
    assert json.loads((tmp_path / "approximation.json").read_text())["rows"] == report.rows
    assert report.to_html().count("<svg") == 4
    with pytest.raises(ValueError, match="did you mean 'performer'"):
        effattn.measure_approximation(methods=["perfomer"])
    with pytest.raises(ValueError, match="at least 256"):
        effattn.measure_approximation(tokens=torch.arange(100), length=128)
