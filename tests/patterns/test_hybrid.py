"""The backend `hybrid`: a window and linear attention under one denominator, what it remembers, in
models, and bad input. The properties that every backend has are in test_conformance.py."""

import pytest
import torch
from conftest import tiny

import effattn
from effattn.conformance import check, inputs
from effattn.errors import Unsupported

MAPS = ("exp", "hedgehog", "elu", "relu2", "softmax")


def by_hand(attn, q, k, v, window, sinks):
    """The definition query by query, with a map that needs no learned weight (elu + 1)."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = torch.zeros_like(q)
    phi = lambda x: torch.nn.functional.elu(x) + 1  # noqa: E731
    for t in range(tokens):
        total, mass = 0.0, 0.0
        for j in range(t + 1):
            if t - j < window or j < sinks:
                weight = (q[:, :, t] * k[:, :, j]).sum(-1) / q.shape[-1] ** 0.5
                weight = weight.exp()
            else:
                weight = (phi(q[:, :, t]) * phi(k[:, :, j])).sum(-1)
                weight = weight * attn.balance.detach().exp()
            total = total + weight[..., None] * v[:, :, j]
            mass = mass + weight[..., None]
        out[:, :, t] = total / mass
    return out


@pytest.mark.parametrize(("window", "sinks"), [(4, 0), (4, 3), (1, 1)])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_it_is_one_sum_over_near_and_far_keys(window, sinks, impl):
    q, k, v = inputs(
        23,
        torch.float64,
    )
    attn = effattn.backend(
        "hybrid",
        window=window,
        sinks=sinks,
        feature_map="elu",
        impl=impl,
    )
    got = attn(
        q,
        k,
        v,
    )
    with torch.no_grad():
        attn.balance.copy_(
            torch.tensor([-3.0, 0.0, 1.0, -1.0]),
        )
    assert not torch.allclose(attn(q, k, v), got)
    expected = by_hand(
        attn,
        q,
        k,
        v,
        window,
        sinks,
    )
    torch.testing.assert_close(
        attn(q, k, v),
        expected,
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("feature_map", MAPS)
def test_a_window_of_everything_is_dense(feature_map):
    q, k, v = inputs(
        40,
        torch.float64,
    )
    expected = effattn.backend("dense")(q, k, v)
    for window in (40, 99):
        attn = effattn.backend(
            "hybrid",
            window=window,
            feature_map=feature_map,
        )
        torch.testing.assert_close(
            attn(q, k, v),
            expected,
        )


@pytest.mark.parametrize("feature_map", MAPS)
def test_keys_of_zero_count_the_same_near_and_far(feature_map):
    """At first: what is known of nothing is the mean."""
    q, k, v = inputs(
        30,
        torch.float64,
    )
    attn = effattn.backend(
        "hybrid",
        window=4,
        feature_map=feature_map,
    )
    got = attn(0 * q, 0 * k, v)[:, :2, -1]
    expected = (v if feature_map != "relu2" else v[:, :, -4:]).mean(2)[:, [0, 0]]
    torch.testing.assert_close(
        got,
        expected,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "spec",
    [
        "hybrid(window=20, sinks=3)",
        pytest.param("hybrid(window=7, features=5)", marks=pytest.mark.slow),
    ],
)
def test_long_sequences_and_learned_weights(spec):
    """What leaves the window goes into the sums in every kind of call."""
    attn = effattn.backend(
        spec,
        impl="torch",
    )
    attn(*inputs(5))
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(
                torch.randn_like(parameter),
                alpha=0.3,
            )
    some = ("accuracy", "padding", "decode", "gradients", "state_bytes", "state_moves", "documents")
    check(
        attn,
        properties=some,
        lengths=(1, 70),
    )


def test_the_state_does_not_grow_and_gives_few_tokens_back():
    attn, (q, k, v) = effattn.backend("hybrid(window=16, sinks=2)"), inputs(200)
    state, bytes_at = attn.new_state(), {}
    for at in range(200):
        attn(*(x[:, :, at : at + 1] for x in (q, k, v)), state=state)
        bytes_at[at + 1] = state.nbytes
    assert len({bytes_at[n] for n in range(64, 200, 16)}) == 1
    state.crop(190)
    with pytest.raises(ValueError, match="crop: got 100, but the first 160 tokens are in the sums"):
        state.crop(100)
    got = attn(*(x[:, :, 190:] for x in (q, k, v)), state=state)
    torch.testing.assert_close(
        got,
        attn(q, k, v)[:, :, 190:],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.interpreted
def test_triton_runs_both_parts():
    q, k, v = inputs(40)
    attn = effattn.backend(
        "hybrid",
        window=8,
        sinks=2,
        impl="triton",
    )
    state = attn.new_state()
    got = [attn(*(x[:, :, part] for x in (q, k, v)), state=state) for part in PARTS]
    attn.impl = "torch"
    torch.testing.assert_close(
        torch.cat(got, dim=2),
        attn(q, k, v),
        rtol=1e-4,
        atol=1e-5,
    )


PARTS = (slice(0, 37), slice(37, 38), slice(38, 40))


def test_generation_in_a_model(tokens):
    """Greedy and left padding with a cache give what the whole sequence gives."""
    model = effattn.swap(
        tiny("llama"),
        "hybrid(window=9, sinks=2)",
    )
    prompt = tokens[:42].clamp(min=1).view(1, 42)
    options = dict(
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    cached = model.generate(
        prompt,
        **options,
    )
    assert torch.equal(cached, model.generate(prompt, **options, use_cache=False))
    padded = torch.cat(
        [torch.zeros(1, 9, dtype=torch.long), prompt],
        dim=1,
    )
    mask = (torch.arange(51) >= 9).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 9:], cached)


def test_checkpoints_and_training(tokens, tmp_path):
    """Gradients reach the balance and the maps, and what they learned comes back bit for bit."""
    spec = "hybrid(window=9, sinks=2)"
    model = effattn.swap(tiny("llama", dtype=torch.float32), {"0": spec}).train()
    model(tokens[None, :60], labels=tokens[None, :60]).loss.backward()
    names = ("balance", "map_q", "map_k")
    learned = {n: p for n, p in model.named_parameters() if n.split(".")[-1] in names}
    assert len(learned) == 3
    assert all(p.grad.abs().sum() > 0 for p in learned.values())
    with torch.no_grad():
        for parameter in learned.values():
            parameter.add_(torch.randn_like(parameter))
    effattn.save(
        model.eval(),
        tmp_path / "out",
    )
    again = effattn.load(tmp_path / "out")
    assert torch.equal(again(tokens[None, :30]).logits, model(tokens[None, :30]).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "hybrid: window: got 0"),
        ({"window": 4, "sinks": -1}, "hybrid: sinks: got -1"),
        ({"window": 4, "feature_map": "identity"}, "hybrid: feature_map='identity'"),
        ({"window": 4, "feature_map": "elv"}, "hybrid: feature_map: .*did you mean 'elu'"),
        ({"window": 4, "feature_map": "elu", "features": 3}, "hybrid: features: only a learned"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        effattn.backend("hybrid", **options)


def test_bad_calls():
    q, k, v = inputs(6)
    with pytest.raises(Unsupported, match="causal=False"):
        effattn.backend("hybrid", window=3)(q, k, v, causal=False)
    attn = effattn.backend(
        "hybrid",
        window=3,
        feature_map="elu",
    )
    attn(q, k, v)
    with pytest.raises(ValueError, match="q: expected 4 heads, as balance has learned, got 2"):
        attn(
            q[:, :2],
            k,
            v,
        )
