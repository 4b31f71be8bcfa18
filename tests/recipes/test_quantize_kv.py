"""What a quantized cache costs: measured token by token, planned under a budget, by the whole job
and its report.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny
from flows import run_small, save_small
from outliers import plant_outliers
from typer.testing import CliRunner

import effattn
from effattn.evaluate.loss import compare, token_losses
from effattn.hf import anatomy
from effattn.quant.sensitivity import budget, lanes
from effattn.quant.sensitivity.budget import Choice
from effattn.quant.sensitivity.lanes import Lane
from effattn.quant.sensitivity.report import QuantizeReport
from effattn.quant.sensitivity.tokenwise import tokenwise
from effattn.recipes import quantize_kv
from effattn.recipes.cli import app
from effattn.recipes.quantize_kv import Settings
from effattn.reports.tables import UNKNOWN

INT2 = "int2(group=16, residual=16)"
INT4 = "int4(group=16, residual=16)"


@pytest.fixture(scope="module")
def model():
    return effattn.embedded.load()[0]


@pytest.fixture(scope="module")
def text():
    return effattn.embedded.tokens("validation", 400)


def small():
    """A random model with the embedded model's vocabulary: two layers, two heads of 32."""
    return tiny(
        "llama", dtype=torch.float32, vocab_size=3072, num_attention_heads=2, num_key_value_heads=2
    )


# ---- token by token
# -------------------------------------------------------------------------------------------------


def test_a_full_cache_token_by_token_is_one_forward(tokens):
    parent, student = tiny("llama"), tiny("llama", seed=1)
    seen = []
    same = tokenwise(
        parent, parent, tokens[:97], 24, batch=3, progress=lambda *done: seen.append(done)
    )
    losses = token_losses(parent, tokens[:97], 24)
    assert same["tokens"] == 96
    assert same["cross_entropy"] == pytest.approx(losses.double().mean().item(), rel=1e-6)
    assert same["kl"] < 1e-10
    assert (same["agreement"], same["perplexity"]) == (
        1.0,
        pytest.approx(same["parent_perplexity"], rel=1e-9),
    )
    assert seen[-1] == (96, 96)
    other, expected = (
        tokenwise(parent, student, tokens[:97], 24),
        compare(parent, student, tokens[:97], 24),
    )
    for name in ("perplexity", "kl"):
        assert other[name] == pytest.approx(expected[name], rel=1e-5)
    assert other["parent_perplexity"] == same["perplexity"]
    assert other["agreement"] < 0.5


def test_the_quantized_cache_is_what_generate_uses(text, monkeypatch):
    # blocks of seven tokens
    monkeypatch.setattr("effattn.evaluate.logits.BYTES", 4 * 3 * 7 * 3072)
    model = small()
    lane = Lane(INT2, INT2).of(model)
    found = tokenwise(model, lane.model, text[:241], 80, batch=3)
    cache, logits = effattn.new_cache(lane.model), []
    with torch.no_grad():
        for at in range(80):
            logits.append(lane.model(text[None, at : at + 1], past_key_values=cache).logits[:, 0])
    alone = tokenwise(model, lane.model, text[:81], 80)
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), text[1:81])
    assert alone["cross_entropy"] == pytest.approx(loss.item(), rel=1e-5)
    assert alone["kl"] > 1e-5
    assert (
        found["held_bytes"]
        == 3 * alone["held_bytes"]
        == 3 * lanes.predicted_bytes(anatomy.of(model), lane.formats(anatomy.of(model)), 80)
    )


@pytest.mark.parametrize(
    ("spec", "perplexity", "agreement"),
    [
        ("int8(residual=16, group=32)", 0.001, 0.995),
        ("int4(residual=16, group=32)", 0.01, 0.97),
        ("int2(residual=64)", 0.12, 0.85),
    ],
)
def test_formats_reach_their_numbers(model, spec, perplexity, agreement):
    text = effattn.embedded.tokens("validation", 12 * 128 + 1)
    found = tokenwise(model, Lane(spec, spec).of(model).model, text, 128)
    assert found["kl"] > 0
    assert abs(found["perplexity"] / found["parent_perplexity"] - 1) < perplexity
    assert found["agreement"] >= agreement


def test_outliers_in_keys_ruin_int4_per_token_and_not_the_default(text):
    model, _ = effattn.embedded.load()
    before = model(text[None, :64]).logits
    plant_outliers(model)
    torch.testing.assert_close(model(text[None, :64]).logits, before, rtol=0, atol=0)
    kl = {}
    for options in ("", ", k_axis='token'"):
        spec = f"int4(group=32, residual=16{options})"
        kl[options] = tokenwise(model, Lane(spec, spec).of(model).model, text[:385], 96)["kl"]
    assert kl[""] < 2e-3
    assert kl[", k_axis='token'"] > 50 * kl[""]


# ---- plans
# -------------------------------------------------------------------------------------------------


def test_the_plan_is_the_best_of_all():
    draw = torch.Generator().manual_seed(0)
    sizes = {"full": 512.0, "int8": 132.5, "int4": 76.0, "int2": 48.0}
    layers = [
        [
            Choice(spec, size, 0.0 if spec == "full" else torch.rand((), generator=draw).item())
            for spec, size in sizes.items()
        ]
        for _ in range(5)
    ]
    front = budget.frontier(layers)
    everything = [
        (
            sum(one.bytes for one in plan),
            sum(one.kl for one in plan),
            tuple(one.spec for one in plan),
        )
        for plan in itertools.product(*layers)
    ]
    assert [one.bytes for one in front] == sorted(one.bytes for one in front)
    for limit in (240.0, 300.0, 555.5, 1000.0, 2559.9, 2560.0, 1e9):
        plan = budget.best(front, limit)
        assert plan.bytes <= limit
        assert plan.kl == pytest.approx(min(kl for size, kl, _ in everything if size <= limit))
        assert (pytest.approx(plan.bytes), plan.specs) in [
            (size, specs) for size, _, specs in everything
        ]
    assert set(budget.best(front, 1e9).specs) == {"full"}
    with pytest.raises(
        ValueError, match=r"got 239.9, the least possible with these formats is 240 bytes"
    ):
        budget.best(front, 239.9)


def test_many_layers_of_one_shape_stay_quick():
    layers = [
        [Choice(str(bits), 16.0 * bits, (1 + index) * 2.0**-bits) for bits in (2, 4, 8, 16)]
        for index in range(64)
    ]
    plan = budget.best(budget.frontier(layers), 64 * 16 * 5)
    assert len(plan.specs) == 64
    assert int(plan.specs[0]) <= int(plan.specs[-1]), "the sensitive ones have more"


def test_a_plan_is_what_swap_takes(model):
    specs = ["int8", INT4, INT4, "full"]
    assert budget.as_swap(specs) == {"0": "int8", "1-2": INT4, "3": "full"}
    lane = Lane("plan", budget.as_swap(specs)).of(model)
    assert [layer["cache"].split(" (")[0] for layer in effattn.describe(lane.model).layers] == specs
    assert [one is None for one in lane.formats(anatomy.of(model))] == [False, False, False, True]


# ---- the job
# -------------------------------------------------------------------------------------------------

SMALL = dict(
    formats=(INT4, INT2),
    budget=170.0,
    evaluation_tokens=128,
    sensitivity_tokens=64,
    length=64,
    retrieval_length=128,
    retrieval_trials=1,
    retrieval_depths=(0.2, 0.8),
    retrieval_style="code",
    decode_contexts=(24,),
    decode_batches=(1, 2),
    decode_steps=2,
    decode_seconds=0.01,
)
# numbers that a token's keys and values are: layers, heads, k and v, head size
BYTES = 2 * 2 * 2 * 32


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was stopped while it timed, and then went on: the job, what it measured again, and
    the report.
    """
    folder = tmp_path_factory.mktemp("quantize")
    effattn.save(small(), folder / "model", effattn.embedded.tokenizer())
    wanted = Settings(**SMALL, model=str(folder / "model"), output=folder / "out")
    patch = pytest.MonkeyPatch()
    asked = []

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    patch.setattr(lanes, "decode_speed", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_kv.run(wanted)
    assert not wanted.output.exists()
    with pytest.raises(ValueError, match=r"finished parts of a run with other settings \(length\)"):
        quantize_kv.run(dataclasses.replace(wanted, length=63))
    patch.undo()
    patch.setattr(
        "effattn.quant.sensitivity.tokenwise.tokenwise", lambda *a, **k: asked.append("tokenwise")
    )
    report = quantize_kv.run(wanted)
    patch.undo()
    return wanted, asked, report


def test_a_killed_run_goes_on_and_leaves_nothing_behind(finished):
    wanted, asked, _ = finished
    assert asked == [], "every finished part was kept"
    assert not wanted.partial.exists()
    assert sorted(path.name for path in wanted.output.parent.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("spec", [INT4, INT2, "int8(residual=64)"])
@pytest.mark.parametrize("kind", ["gemma2", "mistral", "llama"])
def test_rings_of_a_models_own_windows_do_not_grow(kind, spec):
    more = {"sliding_window": 32} if kind == "mistral" else {}
    model = tiny(kind, dtype=torch.float32, num_key_value_heads=2, **more)
    lane, full = (Lane(one or "full", one).of(model) for one in (spec, None))
    for row in lanes.allocated(lane, [20, 90, 128], seed=0):
        assert row["predicted"] == row["held"] == row["allocated"]
    grow = {"gemma2": [False, True], "mistral": [True, True], "llama": [True, True]}[kind]
    for one in (lane, full):  # where all are rings: of a token that they hold
        assert [size > 0 for size in one.layer_bytes()] == grow
    parts = anatomy.of(model)
    late = [lanes.predicted_bytes(parts, lane.formats(parts), n) for n in (2**15, 2**16)]
    per_token = 0 if kind == "mistral" else sum(lane.layer_bytes())
    assert late[1] - late[0] == 2**15 * per_token


def test_each_layer_alone_can_be_left_out_and_the_report_says_so(tmp_path, monkeypatch):
    save_small(tmp_path)
    told = []
    keep = quantize_kv.flow.parts
    monkeypatch.setattr(quantize_kv.flow, "parts", lambda *a: told.append(a[2]) or keep(*a))
    place = (str(tmp_path / "model"), tmp_path / "text.txt")
    with_it = run_small("quantize_kv", *place, tmp_path / "with")
    without = run_small("quantize_kv", *place, tmp_path / "without", sensitivity_tokens=0)
    assert told == ["each layer alone: 2 layers, 1 formats"]
    assert len(with_it.data["sensitivity"]) == 2
    assert UNKNOWN not in with_it.to_markdown()
    assert without.data["sensitivity"] == without.data["frontier"] == []
    assert without.data["formats"][1]["quality"] == with_it.data["formats"][1]["quality"]
    for page in (without.to_markdown(), without.to_html()):
        assert "sensitivity_tokens is 0" in page
        assert UNKNOWN in page


def test_the_checkpoint_has_the_plan(finished, text):
    wanted, _, report = finished
    plan = report.data["plan"]
    assert sorted(plan["specs"]) == [INT2, INT4]
    assert plan["bytes_per_token"] == BYTES * 3 / 8 + 4 * BYTES / 16 == 160
    assert report.data["saved"] == plan["cache"]
    assert report.data["verification"]["max_logit_difference_decoding"] < 1e-4
    again = effattn.load(wanted.output)
    cache = effattn.new_cache(again)
    with torch.no_grad():
        again(text[None], past_key_values=cache)
    formats = Lane("plan", plan["cache"]).formats(anatomy.of(again))
    assert sum(layer.nbytes for layer in cache.layers) == lanes.predicted_bytes(
        anatomy.of(again), formats, len(text)
    )
    assert QuantizeReport.load(wanted.output).data == json.loads(report.to_json())


def test_the_report_says_what_was_measured(finished):
    data = finished[2].data
    names = [row["name"] for row in data["formats"]]
    assert names == ["full", INT4, INT2, "plan"]
    kl = [row["quality"]["kl"] for row in data["formats"]]
    assert kl[0] < 1e-9 < kl[1] < kl[3] < kl[2]
    for row in data["formats"]:
        for one in row["held"]:
            assert one["predicted"] == one["held"] == one["allocated"], (
                "bytes are predicted exactly"
            )
    assert data["formats"][0]["bytes_per_token"] == 4 * BYTES
    assert {(row["layer"], row["spec"]) for row in data["sensitivity"]} == set(
        itertools.product(range(2), (INT4, INT2))
    )
    assert {row["lane"] for row in data["retrieval"]} == set(names)
    assert {row["packed"] for row in data["retrieval"] if row["lane"] == INT4} == {96}
    assert {(row["batch"], row["lane"]) for row in data["decode"]} == set(
        itertools.product((1, 2), names)
    )
    assert all(row["ms"] > 0 and row["rounds"] == 2 for row in data["decode"])
    page, tables = finished[2].to_html(), finished[2].to_markdown()
    for said in (
        "effattn.swap(model, cache=",
        INT2,
        "Each layer alone",
        "has not learned this",
        "least sum of KLs",
    ):
        assert said in tables
        assert said.replace("'", "&#39;") in page or said in page
    assert UNKNOWN not in tables


def test_no_layer_alone_where_none_is_asked_for(finished):
    wanted, _, before = finished
    less = {"sensitivity_tokens": 0, "budget": None, "retrieval_trials": 0, "output": None}
    report = quantize_kv.run(dataclasses.replace(wanted, decode_contexts=(), **less))
    assert report.data["sensitivity"] == report.data["frontier"] == []
    assert report.data["formats"] == before.data["formats"][:-1]  # but for the plan


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (
            ["--budget-bytes-per-token", "500"],
            "the least possible with these formats is 1,024 bytes a token",
        ),
        (
            ["--budget-bytes-per-token", "5000", "--sensitivity-tokens", "0"],
            "sensitivity_tokens: got 0, and a plan for budget_bytes_per_token is made of what each "
            "layer loses alone; valid is at least length",
        ),
        (
            ["--sensitivity-tokens", "3"],
            "sensitivity_tokens: got 3, valid is at least length",
        ),
        (["--formats", "int5"], "did you mean"),
        (["--formats", "full"], "full"),
        (["--formats", "int4(grup=32)"], "did you mean 'group'"),
        (["--bits", "3"], "bits: got '3'"),
        (["--weights", "nf5"], "did you mean 'nf4'"),
        (
            ["--length", "4096", "--evaluation-tokens", "1000"],
            "evaluation_tokens: got 1000, valid is at least length",
        ),
        (["--decode-batches", "0,1,-2"], "decode_batches: got"),
        (["--retrieval-trials", "-1"], "retrieval_trials: got -1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, given, error):
    if "--formats" not in given and "--bits" not in given:
        given = [*given, "--formats", INT2]
    done = CliRunner().invoke(app, ["quantize-kv", *given, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert error in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_the_command():
    path = Path(__file__).parents[2] / "recipes" / "quantize_kv.py"
    assert path.samefile(quantize_kv.__file__)
    (mounted,) = [one for one in app.registered_commands if one.name == "quantize-kv"]
    assert mounted.callback is quantize_kv.command
