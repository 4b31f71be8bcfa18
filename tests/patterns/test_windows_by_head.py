"""sliding(window=[...]): a window for each K/V head, and the plan that finds them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn.conformance import check, inputs
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.positions import rule
from effattn.states.full import ROLLBACK
from effattn.surgery.checkpoint import load_model
from effattn.swapping.spans import AdaptiveSpan

SPECS = (
    "sliding(window=[5, None], impl='{}')",
    "sliding(window=[5, 3], sinks=2, impl='{}')",
    "sliding(window=[3, 3], dilation=2, impl='{}')",
    "sliding(window=[4, 2], sink_logits=True, impl='{}')",
)


@pytest.mark.parametrize("spec", SPECS)
def test_it_keeps_to_the_contract(spec):
    check(spec.format("torch"), lengths=(1, 4, 5, 6, 37))


def test_both_ways_it_keeps_to_the_contract():
    check("sliding(window=[3, 5], impl='torch')", causal=False, lengths=(1, 5, 21))


def test_triton_keeps_to_the_contract():
    some = ("accuracy", "gradients")
    check(SPECS[1].format("triton"), properties=some, lengths=(9,), sizes=(2, 2, 2, 16))


def test_each_head_sees_its_own_window():
    q, k, v = inputs(40, torch.float64, sizes=(2, 6, 3, 8))
    got = effattn.backend("sliding", window=[8, None, 3], sinks=1)(q, k, v)
    for head, window in enumerate((8, None, 3)):
        name = "dense" if window is None else f"sliding(window={window}, sinks=1)"
        own = slice(2 * head, 2 * head + 2)
        expected = effattn.backend(name)(q[:, own], k[:, [head]], v[:, [head]])
        torch.testing.assert_close(got[:, own], expected)


def test_the_state_is_a_ring_a_window_and_its_bytes_are_their_sum():
    attn = effattn.backend("sliding", window=[8, None, 3, 8])
    q, k, v = inputs(90, sizes=(2, 4, 4, 16))
    state = attn.new_state()
    attn(q, k, v, state=state)
    assert len(state.parts) == 3
    token = 2 * 2 * 16 * 4
    held = 2 * (8 + ROLLBACK) + 90 + 3 + ROLLBACK
    assert (
        state.nbytes
        == held * token
        == attn.cost(effattn.Shape(2, 4, 4, 90, 90, 16)).state_bytes * 2
    )


def test_sinks_stand_at_their_place_in_each_ring():
    q, k, v = inputs(30, torch.float64, sizes=(1, 2, 2, 8))
    rope = rule("rope", length=64, head_dim=8)
    attn = effattn.backend("sliding", window=[4, 9], sinks=2)
    got = attn(q, k, v, rotary=rope)
    for head, window in enumerate((4, 9)):
        one = effattn.backend("sliding", window=window, sinks=2)
        expected = one(q[:, [head]], k[:, [head]], v[:, [head]], rotary=rope)
        torch.testing.assert_close(got[:, [head]], expected)
    state, steps = attn.new_state(), []
    for at in range(30):
        some = (x[:, :, at : at + 1] for x in (q, k, v))
        steps.append(attn(*some, state=state, rotary=rope))
    torch.testing.assert_close(torch.cat(steps, dim=2), got)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([], "window: got \\[\\], valid is .* a list with one for each K/V head"),
        ([4, 0], "sliding: window: got 0"),
        ("4", "window: got '4'"),
        ([4, 2.5], "sliding: window: got 2.5"),
    ],
)
def test_bad_windows_are_refused(window, message):
    with pytest.raises(ValueError, match=message):
        effattn.backend("sliding", window=window)


def test_what_it_cannot_do_is_refused():
    q, k, v = inputs(9)
    attn = effattn.backend("sliding", window=[4, 2])
    with pytest.raises(ValueError, match="got 3 windows, valid is one for each of k's 2 heads"):
        effattn.backend("sliding", window=[4, 2, 2])(q, k, v)
    with pytest.raises(ValueError, match="window: got 4, a bidirectional window is odd"):
        attn(q, k, v, causal=False)
    with pytest.raises(Unsupported, match="no static form"):
        attn.static_state(16)


def test_it_lives_in_a_model():
    """Greedy, beams, a batch with padding, and a checkpoint's spec."""
    model = tiny("llama")
    heads = model.config.num_key_value_heads
    effattn.swap(model, "sliding", window=[6, None] * (heads // 2), sinks=1)
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    both = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 9:], **options)
    assert torch.equal(both[1, 9:], alone[0])
    model.generate(ids, num_beams=3, **options)
    layer = effattn.describe(model).layers[0]
    assert layer["pattern"].startswith("sliding(window=[6, None")
    assert layer["grows"]
    dense = effattn.describe(effattn.restore(model)).layers[0]
    assert 2 * layer["kv_bytes_per_token"] == dense["kv_bytes_per_token"]


# The plan
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded")


def test_a_plan_keeps_its_bound_and_saves_bytes(embedded):
    model, tokenizer = embedded
    ids = effattn.embedded.tokens("train", 2048, tokenizer=tokenizer)
    held = effattn.embedded.tokens("validation", 1024, tokenizer=tokenizer)
    dense = effattn.perplexity(model, held, context=512)
    plans = [effattn.fit_windows(model, ids, error=e, length=512) for e in (0.02, 0.1)]
    for plan, bound in zip(plans, (0.02, 0.1), strict=True):
        assert max(plan.errors) <= bound
        assert sorted(plan) == ["0", "1", "2", "3"]
    found = []
    for plan in plans:
        effattn.swap(model, plan)
        cache = new_cache(model)
        with torch.no_grad():
            model(held[None, :512], past_key_values=cache)
        perplexity = effattn.perplexity(model, held, context=512)
        found.append((sum(layer.nbytes for layer in cache.layers), perplexity))
        effattn.restore(model)
    whole = 4 * 512 * 2 * 8 * 32 * 4
    assert found[1][0] < found[0][0] < whole
    assert found[1][0] < whole / 3
    assert found[0][1] < 1.005 * dense
    assert found[1][1] < 1.03 * dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": 0}, "error: got 0, valid is a number between 0 and 1"),
        ({"error": True}, "error: got True"),
        ({"sinks": -1}, "sinks: got -1"),
        ({"length": 10}, "length: got 10"),
    ],
)
def test_bad_arguments_of_a_plan_are_refused(embedded, options, message):
    with pytest.raises(ValueError, match=message):
        effattn.fit_windows(embedded[0], torch.arange(2048) % 99, **options)


def test_calibration_that_is_no_text_is_refused(embedded):
    for given, message in (
        (torch.ones(9), "float32 .9,."),
        (torch.arange(99), "got 99 tokens, valid are at least length=2,048"),
        ([1, 2], "calibration: got .1, 2."),
    ):
        with pytest.raises(ValueError, match=message):
            effattn.fit_windows(embedded[0], given)


# ---- learned


def test_the_soft_mask_is_the_papers_and_has_a_gradient():
    q, k, v = (x[:1] for x in inputs(20, torch.float64, sizes=(2, 4, 2, 8)))
    spans = AdaptiveSpan(2, 20, ramp=4, sinks=1).double()
    with torch.no_grad():
        spans.spans.copy_(torch.tensor([0.26, 0.61]))
    out = torch.zeros_like(q)
    for head in range(4):
        z = 20 * spans.spans[head // 2].item()
        for i in range(20):
            keys = k[0, head // 2, : i + 1]
            m = torch.tensor([min(max((4 + z - (i - j)) / 4, 0), 1) for j in range(i + 1)])
            m[0] = 1
            weights = (keys @ q[0, head, i] * 8**-0.5).exp() * m
            out[0, head, i] = weights @ v[0, head // 2, : i + 1] / weights.sum()
    torch.testing.assert_close(spans(q, k, v), out)
    assert spans.windows() == [10, 17]
    loss = spans(q, k, v).square().sum()
    (slope,) = torch.autograd.grad(loss, [spans.spans])
    for head in range(2):
        step = torch.zeros(2).double()
        step[head] = 1e-6
        with torch.no_grad():
            spans.spans.add_(step)
            high = spans(q, k, v).square().sum()
            spans.spans.sub_(2 * step)
            low = spans(q, k, v).square().sum()
            spans.spans.add_(step)
        assert ((high - low) / 2e-6 - slope[head]).abs() < 1e-4 * slope.abs().max()


def test_learned_windows_are_better_than_one_for_all_heads(embedded):
    model, tokenizer = embedded
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids = effattn.embedded.tokens("train", 768, tokenizer=tokenizer)
    small, large = (
        effattn.learn_windows(model, ids, penalty=p, length=256, ramp=16, steps=40)
        for p in (0.03, 0.003)
    )
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def keys(plan):
        made = [effattn.backend(spec) for spec in plan.values() if spec != "dense"]
        dense = 8 * 256 * (len(plan) - len(made))
        return dense + sum(one or 256 for each in made for one in each.windows)

    whole = 4 * 8 * 256
    assert keys(small) < keys(large) < whole
    assert keys(small) < whole / 3
    assert sum(small.errors) > sum(large.errors)
    held = effattn.embedded.tokens("validation", 1024, tokenizer=tokenizer)
    dense = effattn.perplexity(model, held, context=256)
    effattn.swap(model, small)
    learned = effattn.perplexity(model, held, context=256)
    effattn.restore(model)
    effattn.swap(model, "sliding", window=keys(small) // 32, sinks=4)
    uniform = effattn.perplexity(model, held, context=256)
    effattn.restore(model)
    assert learned < 1.005 * dense
    assert learned < 0.97 * uniform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0}, "penalty: expected a number above 0"),
        ({"penalty": float("nan")}, "penalty: expected a finite"),
        ({"ramp": 0}, "ramp: got 0"),
        ({"steps": 1.5}, "steps: got 1.5"),
        ({"length": 10}, "length: got 10"),
    ],
)
def test_bad_arguments_of_learning_are_refused(embedded, options, message):
    with pytest.raises(ValueError, match=message):
        effattn.learn_windows(embedded[0], torch.arange(2048) % 99, **options)


GRANITE = ("granite", {"attention_multiplier": 0.02})
GEMMA2 = ("gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 4096})


@pytest.mark.parametrize(("kind", "options"), [GRANITE, GEMMA2], ids=["scale", "softcap"])
@pytest.mark.parametrize("plan_of", [effattn.fit_windows, effattn.learn_windows])
def test_a_scale_a_cap_and_windows_of_the_models_own(plan_of, kind, options):
    how = {"error": 0.3} if plan_of is effattn.fit_windows else {"penalty": 1.0, "ramp": 8}
    ids = torch.randint(1, 96, (256,), generator=torch.Generator().manual_seed(0))
    model = tiny(kind, **options).eval()
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight.data *= 400

    def output():
        seen = []
        hook = layer.register_forward_hook(lambda _, given, out: seen.append(out[0]))
        with torch.no_grad():
            model(ids.view(4, 64), use_cache=False)
        hook.remove()
        return seen[0]

    with torch.inference_mode():
        plan = plan_of(model, ids, length=64, sinks=0, **how)
    assert plan["0"] != "dense"
    before = output()
    effattn.swap(model, plan)
    change = (output() - before).norm() / before.norm()
    assert abs(change - plan.errors[0]) < 0.01 * change
    # a window of the model's own is no wider for it
    plan = plan_of(tiny("mistral", sliding_window=16), ids, length=64, **how)
    assert set(plan.values()) == {"dense"}
    assert set(plan.errors) == {0.0}
