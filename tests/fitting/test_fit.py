"""The search from end to end, on tiny models."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.fitting import speed
from effattn.fitting.accounting import Ledger, counted
from effattn.fitting.building import Builder, apply
from effattn.fitting.catalog import Catalog, measure
from effattn.fitting.frontier import points
from effattn.fitting.harm import Judge, divergence
from effattn.fitting.plan import Plan
from effattn.fitting.search import every_uniform, search, within
from effattn.fitting.session import Asked, Session
from effattn.heads.gqa import convert_gqa
from effattn.hf import anatomy
from effattn.hf.weights import weight_bytes
from effattn.measuring.variants import Variant, build
from effattn.quant.sensitivity.tokenwise import tokenwise
from effattn.resuming import Parts

LENGTH, SCORED = 128, 256
HOW = {"length": LENGTH, "score_tokens": SCORED}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tokens):
    return tokens[:1500]


def session_of(model, text, *allow: str, **budget) -> Session:
    asked = Asked(allow=allow or None, **HOW)
    return Session(model, effattn.Budget(**budget), text, asked)


@torch.no_grad()
def logits(model, text) -> torch.Tensor:
    return model(text[None, :LENGTH]).logits


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 30.0, 300.0])
def test_a_divergence_is_told_in_fp32(size):
    """Of logits that are nearly the same, and of some that have nothing to do with each other."""
    draw = torch.Generator().manual_seed(0)
    parent = 4 * torch.randn(64, 3000, generator=draw)
    student = parent + size * torch.randn(64, 3000, generator=draw)
    ours, theirs = (one.double().log_softmax(-1) for one in (student, parent))
    exact = (theirs.exp() * (theirs - ours)).sum(-1)
    found = divergence(student, parent)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=1e-15)
    assert found.double().mean().item() == pytest.approx(exact.mean().item(), rel=1e-3)
    assert not divergence(parent, parent.clone()).any()


def test_harm_is_the_kl_of_the_whole_model(model, text):
    other = tiny("llama", seed=1, dtype=torch.float32)
    found = Judge(model, text[:257], LENGTH).of(other)
    ids = text[:256].view(2, LENGTH)
    with torch.no_grad():
        ours, theirs = (one(ids).logits.double().log_softmax(-1) for one in (other, model))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    loss = -ours.flatten(0, 1).gather(1, text[1:257, None]).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-6)
    assert found["cross_entropy"] == pytest.approx(loss, rel=1e-6)
    assert Judge(model, text[:257], LENGTH).of(model)["kl"] == 0


def test_what_rounding_does_is_far_below_any_harm(model, text):
    judge = Judge(model, text[:257], LENGTH)
    assert 0 <= judge.rounding() < 1e-10
    assert Judge(tiny("llama", dtype=torch.bfloat16), text[:257], LENGTH).rounding() < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt"])
def test_harm_in_16_bits_is_that_of_the_change_alone(text, kind):
    """Rounding does more than an int8 cache: it is run in fp32, layer by layer, and left as it
    was."""
    half = tiny(kind, dtype=torch.bfloat16)
    whole = copy.deepcopy(half).float()
    before = {name: (x.data_ptr(), x.clone()) for name, x in half.named_parameters()}
    told = []
    for parent in (half, whole):
        swapped = effattn.swap(copy.deepcopy(parent), cache={"1": "int8(residual=8)"})
        told.append(Judge(parent, text[:257], 64).of(swapped))
    assert 0 < told[0]["kl"] < 1e-4
    assert told[0] == pytest.approx(told[1], rel=1e-3)
    for name, one in half.named_parameters():
        assert one.dtype == torch.bfloat16
        assert (one.data_ptr(), True) == (before[name][0], torch.equal(one, before[name][1]))


def test_harm_of_a_packed_cache_is_that_of_decoding(model, text):
    packed = build(model, Variant("x", {"cache": "int4(group=16, residual=0, first=0)"}))
    decoded = tokenwise(model, packed, text[:257], 64)["kl"]
    judge = Judge(model, text[:257], 64)
    assert judge.of(packed, piece=1)["kl"] == pytest.approx(decoded, rel=1e-3)
    assert judge.of(packed, piece=8)["kl"] == pytest.approx(decoded, rel=0.5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("gemma3_text", torch.float32), ("qwen3", torch.bfloat16)],
)
def test_harm_of_one_layer_is_the_same_from_that_layer_on(text, kind, dtype):
    """Layers before it are not run again, those behind it take whole windows."""
    parent = tiny(kind, dtype=dtype)
    builder, judge = Builder(anatomy.of(parent), text, length=64), Judge(parent, text[:257], 64)
    changes = [("cache", "int4(group=16, residual=8)"), ("window", 8), ("ffn_weights", "int8")]
    changes += [("kv_heads", 2), ("ffn", 48)]
    hidden, scored = builder.teacher.embed(), judge.layers.embed()
    for index in range(2):
        inputs = [states.clone() for states in hidden]
        seen = builder.see(index, hidden)
        for name, value in changes:
            student = builder.alone(index, name, value, seen, inputs)
            whole, alone = judge.of(student), judge.alone(student, index, scored)
            assert whole["kl"] > 0
            assert alone == pytest.approx(whole, rel=1e-4)
        scored = judge.layers.run(index, scored)


def test_heads_of_all_layers_are_what_a_conversion_makes(model, text):
    """The builder walks layer by layer as `convert_gqa` does."""
    parts = anatomy.of(model)
    builder = Builder(parts, text, length=LENGTH)
    made = builder.build(builder.parent.with_field("kv_heads", 2))
    converted = copy.deepcopy(model)
    convert_gqa(converted, 2, text, length=LENGTH)
    torch.testing.assert_close(logits(made, text), logits(converted, text))
    assert made.config.num_key_value_heads == 2  # alike: plain


def test_a_narrower_ffn_is_fitted(model, text):
    """The down projection is solved for what is left: no other is closer on the same text."""
    parts = anatomy.of(model)
    builder = Builder(parts, text, length=LENGTH)
    made = builder.build(builder.parent.with_field("ffn", 48, [0]))
    plain = copy.deepcopy(made)
    own = anatomy.of(made).layers[0].feed_forward
    assert own.size == 48
    inputs, wanted = [], []

    def note(_, args, output):
        inputs.append(args[0].flatten(0, -2))

    handle = own.output.register_forward_hook(note)
    whole = parts.layers[0].feed_forward.output.register_forward_hook(
        lambda _, __, output: wanted.append(output.flatten(0, -2))
    )
    ids = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        made(ids), model(ids)
    handle.remove(), whole.remove()
    x, y = inputs[0].double(), wanted[0].double()
    best = torch.linalg.lstsq(x, y).solution.T
    error, least = (
        (x @ weight.T - y).square().sum() for weight in (own.output.weight.double(), best)
    )
    assert error <= 1.01 * least
    assert plain.config.per_layer_config[0].intermediate_size == 48


def test_a_plan_is_found_measured_and_applied(model, text, tmp_path):
    twin = copy.deepcopy(model)
    hooks = []
    twin.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: hooks.append(1))
    budget = effattn.Budget(bytes="70%", context=96, batch=4)
    result = effattn.fit(twin, budget, text, allow=("heads", "cache", "ffn"), **HOW)
    totals = counted(twin, 96, 4)
    parent = counted(model, 96, 4)
    assert sum(totals.values()) < 0.7 * sum(parent.values()) + 10_000
    assert result.bytes <= 0.7 * (result.bytes + sum(parent.values()) - sum(totals.values())) + 1
    assert result.kl == pytest.approx(result.found.best.kl)
    assert not twin.training
    assert hooks  # the modules stayed
    copied = copy.deepcopy(model)  # the plan in words makes the same of the parent
    for line in result.lines:
        exec(line, {"effattn": effattn, "model": copied, "tokens": text})
    assert result.lines
    assert torch.equal(logits(copied, text), logits(twin, text))
    again = effattn.load(effattn.save(twin, tmp_path / "out"))
    assert torch.equal(logits(again, text), logits(twin, text))
    assert counted(again, 96, 4) == totals


def test_what_sparse_weights_take_is_told_once_they_are_there(model, text):
    twin = copy.deepcopy(model)
    budget = effattn.Budget(weight_bytes="75%", context=96)
    result = effattn.fit(twin, budget, text, allow=("sparsity", "heads"), **HOW)
    assert any("ffn in" in one for one in result.plan)
    assert weight_bytes(twin) <= 0.75 * weight_bytes(model)
    assert result.bytes > weight_bytes(twin)


def test_what_was_measured_of_other_weights_is_not_gone_on_from(model, text, tmp_path):
    file = tmp_path / "kept.json"
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    how = {"allow": ("cache",), "resume": file, **HOW}
    budget = effattn.Budget(bytes="90%", context=96, batch=4)
    with pytest.raises(KeyboardInterrupt):
        effattn.fit(copy.deepcopy(model), budget, text, progress=stop, **how)
    assert file.exists()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3
    for changed in (other, copy.deepcopy(model).to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"with other settings \(weights\)"):
            effattn.fit(changed, budget, text, **how)
    effattn.fit(copy.deepcopy(model), budget, text, **how)
    assert not file.exists()


def test_nothing_uniform_is_better(model, text):
    """The plan is at least as good as every uniform one that was measured within the budget."""
    session = session_of(model, text, "heads", "cache", "ffn", bytes="60%", context=96, batch=4)
    kept = Parts(None, {}, {}, "fit")
    space = session.space(kept)
    limits = session.limits()
    found = search(space, limits, session.measure(kept))
    assert found.baselines
    assert all(found.best.kl <= one.kl for one in found.tried)
    assert within(space, found.best.plan, limits)
    assert found.gap == 0
    for _, _, plan in every_uniform(space):
        assert isinstance(plan, Plan)
    curve = points(space, session.measure(kept), 4, rounds=1)
    harms = [row["kl"] for row in curve]
    assert harms == sorted(harms, reverse=True)
    assert all(row["taken"] <= row["limit"] for row in curve)
    assert all(row["kl"] <= row["best_uniform"] for row in curve if row["uniform"])


def test_what_was_measured_is_not_measured_again(model, text, tmp_path):
    session = session_of(model, text, "cache", "ffn", bytes="70%", context=96, batch=4)
    file = tmp_path / "parts.json"
    done = []

    class Stop(Exception):
        pass

    def progress(number, total):
        done.append((number, total))
        if number == 5:
            raise Stop

    builder, judge = session.builder, session.judge
    with pytest.raises(Stop):
        measure(builder, judge, session.ladders, Parts(file, {}, {}, "fit"), progress)
    rest = []
    first = measure(
        builder,
        judge,
        session.ladders,
        Parts(file, {}, {}, "fit"),
        lambda number, total: rest.append((number, total)),
    )
    assert rest[-1] == (done[0][1] - 5, done[0][1] - 5)
    whole = measure(builder, judge, session.ladders, Parts(None, {}, {}, "fit"))
    assert first.harm == pytest.approx(whole.harm, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"bytes": 100}, "bytes: got 100 bytes of .* the least that a plan can have is"),
        ({"kv_bytes_per_token": 1}, "kv_bytes_per_token: got .* the least that a plan"),
        ({"parameters": 10}, "parameters: got 10 parameters; the least"),
        ({"bytes": "1TiB"}, "budget: there is nothing to do"),
    ],
)
def test_budgets_that_cannot_be(model, text, budget, said):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        effattn.fit(model, effattn.Budget(**budget), text, forbid=("window",), **HOW)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_budgets_are_refused_before_anything_is_measured(model, text, monkeypatch):
    """With several limits, too; the nearest that can be is named, and can be."""

    def never(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr(Judge, "__init__", never)
    ask = ("heads", "window", "weights")
    with pytest.raises(ValueError, match=r"weight_bytes: got .* the least that a plan can have is"):
        session_of(model, text, *ask, weight_bytes="1%", tokens_per_s=1e9)
    apart = {"kv_bytes_per_token": "12%", "parameters": "99%"}
    with pytest.raises(ValueError, match="bytes: got 9 bytes"):
        session_of(model, text, *ask, **apart, bytes=9)
    latent = ("latent", "weights")  # latents need plain weights, which are larger
    both = {"kv_bytes_per_token": "20%", "weight_bytes": "60%", "context": 96}
    with pytest.raises(
        ValueError, match=r"cannot be met together.* of these can: at least"
    ) as told:
        session_of(model, text, *latent, **both)
    for row in ("kv_bytes_per_token", "weight_bytes"):
        nearest = re.search(rf"at least ([\d,]+) {row}", str(told.value))[1]
        with pytest.raises(AssertionError, match="measured"):  # it gets so far
            session_of(model, text, *latent, **both | {row: nearest})


@pytest.fixture
def clock(monkeypatch):
    """Steps that take as long as the bytes of their weights say: a nanosecond each."""

    def timed(models, *_, **__):
        return {name: weight_bytes(one) * 1e-6 for name, one in models.items()}

    monkeypatch.setattr(speed, "timed", timed)


@pytest.mark.usefixtures("clock")
def test_a_speed_is_reached(model, text):
    """Of decoding, as it is timed: here 110 % of the parent's with fewer bytes of weights."""
    session = session_of(model, text, "ffn", tokens_per_s="110%", context=96, batch=2)
    kept = Parts(None, {}, {}, "fit")
    session.time(kept)
    space = session.space(kept)
    found = search(space, session.limits(), session.measure(kept), rounds=2)
    parent = space.ledger.weights * 1e-6
    assert session.limits() == {"tokens_per_s": pytest.approx(1.1 * 2000 / parent)}
    built = session.builder.build(found.best.plan)
    assert weight_bytes(built) * 1e-6 <= parent / 1.1 * 1.001
    assert space.step_ms(found.best.plan) == pytest.approx(weight_bytes(built) * 1e-6, rel=1e-3)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("speed", "said"),
    [
        ("900%", "tokens_per_s: got .* decoded tokens a second; the most that a plan can have is"),
        ("50%", "budget: there is nothing to do"),
        ("fast", "tokens_per_s: got 'fast', valid is a positive number"),
        ("40x", "tokens_per_s: unit: got 'x'"),
        (0, "tokens_per_s: got 0"),
    ],
)
def test_speeds_that_cannot_be(model, text, speed, said):
    with pytest.raises(ValueError, match=said):
        session_of(model, text, "ffn", tokens_per_s=speed).time(Parts(None, {}, {}, "fit"))


def test_texts_and_models_that_cannot_be(model, text):
    budget = effattn.Budget(bytes="60%")
    with pytest.raises(ValueError, match="calibration: got 300 tokens, at least"):
        effattn.fit(model, budget, text[:300], **HOW)
    with pytest.raises(ValueError, match="calibration: got 600 tokens, at least"):
        effattn.fit(model, budget, text[:600], allow=("cache", "heads"), **HOW)
    unfitted = session_of(model, text[: SCORED + 1 + LENGTH], "cache", "weights", bytes="90%")
    assert len(unfitted.builder.batches) == 1  # one window does where nothing is fitted to any
    with pytest.raises(ValueError, match="calibration: got 384 tokens, at least 385"):
        session_of(model, text[: SCORED + LENGTH], "cache", "weights", bytes="90%")
    with pytest.raises(ValueError, match="score_tokens: got 8"):
        effattn.fit(model, budget, text, length=LENGTH, score_tokens=8)
    with pytest.raises(ValueError, match="calibration: got"):
        effattn.fit(model, budget, text.float(), **HOW)
    swapped = effattn.swap(copy.deepcopy(model), "sliding", window=8)
    with pytest.raises(Unsupported, match="is swapped"):
        effattn.fit(swapped, budget, text, **HOW)
    with pytest.raises(Unsupported, match="experts"):
        effattn.fit(tiny("mixtral", dtype=torch.float32), budget, text, **HOW)


def test_harm_below_zero_is_none(model):
    rows = [{"layer": 0, "field": "cache", "value": "int8", "kl": -1e-9}]
    assert Catalog(rows).harm == {(0, "cache", "int8"): 0.0}


def choices(name: str, value) -> dict:
    """Fields of a plan: a form of weights is of both blocks."""
    forms = ("attention_weights", "ffn_weights")
    return dict.fromkeys(forms, value) if name == "weights" else {name: value}


CHANGES = [
    [("latent", 24), ("ffn", 48)],
    [("ffn", 0), ("kv_heads", 0)],
    [("cache", "int4(group=16, residual=16)"), ("weights", "lowrank(ratio=0.5)")],
    [("latent", 16), ("weights", "2:4")],
    [("kv_heads", 4), ("weights", "monarch(blocks=4, ratio=0.5)")],
    [("weights", "bitmask(sparsity=0.7)"), ("kv_heads", 0)],
    [("weights", "nf4"), ("kv_heads", 0)],
    [("weights", "int8"), ("ffn", 0)],
]


@pytest.mark.parametrize(
    ("dtype", "cases"), [(torch.float32, CHANGES), (torch.bfloat16, CHANGES[3:4])]
)
def test_every_change_is_built_applied_saved_and_counted(text, tmp_path, dtype, cases):
    """The first layer becomes one thing, the second another."""
    parent = tiny("llama", dtype=dtype)
    builder = Builder(anatomy.of(parent), text, length=LENGTH)
    ledger = Ledger(builder.parts, 96, 2)
    for number, changes in enumerate(cases):
        plan = builder.parent
        for layer, (name, value) in enumerate(changes):
            for field, one in choices(name, value).items():
                plan = plan.with_field(field, one, [layer])
        applied = copy.deepcopy(parent)
        apply(applied, builder.shaped(plan), plan, builder.parent)
        built = builder.build(plan)
        assert torch.equal(logits(applied, text), logits(built, text)), changes
        again = effattn.load(effattn.save(applied, tmp_path / str(number)))
        assert torch.equal(logits(again, text), logits(built, text)), changes
        totals = ledger.totals(plan)
        for what, count in counted(again, 96, 2).items():
            assert totals[what] == count, (changes, what)
        check_padding(again, text)


def check_padding(model, text):
    """Two rows of other lengths decode as each does alone."""
    rows = [text[:40], text[50:82]]
    ids = torch.stack([torch.cat([one.new_zeros(40 - len(one)), one]) for one in rows])
    mask = torch.stack([torch.arange(40) >= 40 - len(one) for one in rows])
    told = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask.long(), **told)
    for row, one in zip(together, rows, strict=True):
        alone = model.generate(one[None], attention_mask=torch.ones(1, len(one)), **told)
        assert torch.equal(row[40:], alone[0, len(one) :])
