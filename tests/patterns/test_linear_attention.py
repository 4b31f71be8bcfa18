"""The backends `linear` and `performer`: what they estimate, their recurrent state, inside of
models, and bad input.

The properties that every backend has are in test_conformance.py, the kernel's in
test_linear_kernel.py."""

import copy
import math

import pytest
import torch
from conftest import tiny

import effattn
from effattn.conformance import check, inputs
from effattn.errors import Unsupported
from effattn.interface import Shape
from effattn.kernels.linear import torch_causal, torch_impl
from effattn.patterns.performer import draw
from effattn.states.full import ROLLBACK
from effattn.states.recurrent import RecurrentState, folded

METHODS = (
    "linear",
    "linear(feature_map='hedgehog')",
    "linear(feature_map='relu', decay='retnet')",
    "performer(features=32)",
)


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# What they estimate
# -------------------------------------------------------------------------------------------------


def test_performer_converges_to_softmax_attention():
    """The error falls like 1 / sqrt(features): 16 times the features, a quarter of it."""
    q, k, v = (0.5 * x for x in inputs(24, torch.float64, sizes=(2, 4, 2, 8)))
    expected = effattn.backend("dense")(q, k, v)
    errors = []
    for features in (32, 512, 8192):
        runs = [
            relative(effattn.backend("performer", features=features, seed=s)(q, k, v), expected)
            for s in range(4)
        ]
        errors.append(sum(runs) / len(runs))
    assert errors[2] < 0.02
    for more, less in zip(errors[1:], errors, strict=False):
        assert 0.15 < more / less < 0.4


def test_performer_estimates_the_exponential_without_bias():
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(8, generator=generator, dtype=torch.float64) * 0.7 for _ in range(2))
    w = draw(1 << 16, 8, seed=0).double()
    estimates = torch.exp(w @ q - q @ q / 2) * torch.exp(w @ k - k @ k / 2)
    expected, deviation = torch.exp(q @ k), estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - expected) < 4 * deviation
    assert deviation < 0.02 * expected


def test_directions_are_orthogonal_with_the_lengths_of_normal_vectors():
    w = draw(100, 16, seed=3).double()
    block = w[16:32]
    lengths = w.norm(dim=-1)
    torch.testing.assert_close(
        block @ block.T,
        torch.diag(lengths[16:32] ** 2),
        atol=1e-5,
        rtol=0,
    )
    assert abs((draw(4096, 16, seed=0).norm(dim=-1) ** 2).mean() - 16) < 0.5
    assert abs(draw(4096, 16, seed=0).mean()) < 0.02  # a QR without its signs' fix is biased
    state = torch.get_rng_state()
    assert torch.equal(draw(100, 16, seed=3), draw(100, 16, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(100, 16, seed=4), draw(100, 16, seed=3))


def test_performer_survives_large_inputs():
    """Exponents of some thousands, and keys that grow: nothing overflows, and the estimate is still
    an average of v.
    """
    q, k, v = inputs(50, sizes=(1, 2, 1, 16))
    grown = torch.linspace(1, 60, 50)[:, None]
    out = effattn.backend("performer", features=64)(q * grown, k * grown, v, scale=1.0)
    assert torch.isfinite(out).all()
    assert out.abs().max() <= v.abs().max() * 1.001


def test_linear_is_katharopoulos():
    q, k, v = inputs(23, torch.float64, sizes=(2, 2, 2, 8))
    phi = lambda x: torch.nn.functional.elu(x) + 1  # noqa: E731
    sums, norms, rows = torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8), []
    for t in range(23):  # algorithm 1 of arXiv:2006.16236
        sums = sums + phi(k[:, :, t, :, None]) * v[:, :, t, None, :]
        norms = norms + phi(k[:, :, t])
        rows.append(
            torch.einsum("bhf,bhfv->bhv", phi(q[:, :, t]), sums)
            / (phi(q[:, :, t]) * norms).sum(-1, True)
        )
    torch.testing.assert_close(effattn.backend("linear")(q, k, v), torch.stack(rows, dim=2))


def test_retention_is_retnet():
    q, k, v = inputs(23, torch.float64, sizes=(2, 2, 2, 8))
    gamma = 1 - 2.0 ** -torch.arange(5.0, 7.0, dtype=torch.float64)
    sums, rows = torch.zeros(2, 2, 8, 8), []
    for t in range(23):  # equation 6 of arXiv:2307.08621
        sums = gamma[:, None, None] * sums + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append(torch.einsum("bhf,bhfv->bhv", q[:, :, t] * 8**-0.5, sums))
    attn = effattn.backend("linear", feature_map="identity", decay="retnet", normalize=False)
    torch.testing.assert_close(attn(q, k, v), torch.stack(rows, dim=2))
    each = effattn.backend("linear", feature_map="identity", decay=gamma.tolist(), normalize=False)
    torch.testing.assert_close(each(q, k, v), attn(q, k, v))


def test_hedgehog_starts_at_the_identity_and_learns():
    q, k, v = inputs(23, torch.float64)
    attn = effattn.backend("linear", feature_map="hedgehog")
    phi = lambda x: torch.softmax(torch.cat([x, -x], -1), -1)  # noqa: E731
    given = effattn.backend("linear", feature_map="identity", normalize=False)
    ones = torch.ones_like(v)
    expected = given(phi(q), phi(k), v) / given(phi(q), phi(k), ones)
    torch.testing.assert_close(attn(q, k, v), expected)
    assert attn.traits.learned
    assert not effattn.backend("linear").traits.learned
    assert [tuple(p.shape) for p in attn.parameters()] == [(4, 16, 16), (2, 16, 16)]
    attn(q, k, v).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in attn.parameters())


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("causal", [True, False])
def test_many_chunks(spec, causal, monkeypatch):
    """The conformance suite again, with sequences of several blocks of several chunks."""
    if "decay" in spec and not causal:
        return
    monkeypatch.setattr(torch_impl, "CHUNK", 4)
    monkeypatch.setattr(torch_causal, "WHOLE", 4)
    # batch rows apart, two or so chunks a block
    monkeypatch.setattr(torch_causal, "BUDGET", {"cpu": 4 * 4 * 16 * 2})
    some = (
        "accuracy",
        "future",
        "padding",
        "blind_rows",
        "decode",
        "gradients",
        "state_moves",
        "poisoned_memory",
    )
    check(
        effattn.backend(spec, impl="torch"),
        causal=causal,
        properties=some[: 8 if causal else 6],
        lengths=(5, 37),
    )


# The state
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", METHODS)
def test_the_state_does_not_grow(spec):
    attn = effattn.backend(spec)
    state, sizes = attn.new_state(), []
    q, k, v = inputs(300)
    for at in range(300):
        attn(*(x[:, :, at : at + 1] for x in (q, k, v)), state=state)
        assert state.seq_len == at + 1
        assert ROLLBACK <= state.k.shape[2] < 2 * ROLLBACK or at < ROLLBACK
        declared = attn.cost(Shape(3, 4, 2, at + 1, at + 1, 16, itemsize=4)).state_bytes
        assert state.nbytes == declared
        sizes.append(state.nbytes)
    assert max(sizes[32:]) == max(sizes[284:])


@pytest.mark.parametrize("spec", METHODS)
def test_rollback(spec):
    """Up to 16 tokens can always be taken back; what the sums hold cannot, and the error says
    so.
    """
    attn = effattn.backend(spec)
    q, k, v = inputs(80)
    whole = attn(q, k, v)
    part = lambda a, b: [x[:, :, a:b] for x in (q, k, v)]  # noqa: E731
    for tokens in (17, 31, 32, 47, 64):
        state = attn.new_state()
        attn(*part(0, tokens), state=state)
        state.crop(tokens - ROLLBACK)
        got = attn(*part(tokens - ROLLBACK, 80), state=state)
        torch.testing.assert_close(
            got,
            whole[:, :, tokens - ROLLBACK :],
            atol=2e-5,
            rtol=2e-4,
        )
    with pytest.raises(
        ValueError, match=r"crop: got 63, but the first 64 tokens are in the sums.*0 and 64 to 80"
    ):
        state.crop(63)
    with pytest.raises(ValueError, match="valid is 0 to 80"):
        state.crop(81)
    state.crop(0)
    assert state.seq_len == state.nbytes == 0


def test_learning_with_a_state():
    """Gradients flow through the sums, as without a state."""
    attn = effattn.backend("performer", features=32)
    leaves = [x.requires_grad_() for x in inputs(90, torch.float64)]
    state = attn.new_state()
    parts = [
        attn(*(x[:, :, a:b] for x in leaves), state=state)
        for a, b in (
            (0, 50),
            (50, 53),
            (53, 90),
        )
    ]
    loss = lambda out: out.square().sum()  # noqa: E731
    got = torch.autograd.grad(loss(torch.cat(parts, dim=2)), leaves)
    for ours, expected in zip(got, torch.autograd.grad(loss(attn(*leaves)), leaves), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_full_state_and_rotation_do():
    """Raw keys in a plain state, or rotated when they are read: the same numbers."""
    from effattn.positions.rope import Rope

    attn = effattn.backend("linear")
    q, k, v = inputs(60)
    turn = Rope(10000.0 ** (-torch.arange(0, 16, 2) / 16))
    whole = attn(q, k, v, rotary=turn)
    for state in (attn.new_state(), effattn.states.full.FullState()):
        parts = [
            attn(*(x[:, :, a:b] for x in (q, k, v)), rotary=turn, state=state)
            for a, b in ((0, 40), (40, 41), (41, 60))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=2e-5, rtol=2e-4)


def test_states_pickle_copy_and_fold_in_steps():
    assert [folded(n) for n in (0, 15, 31, 32, 47, 48, 1000)] == [0, 0, 0, 16, 16, 32, 976]
    attn, (q, k, v) = effattn.backend("linear"), inputs(40)
    state = attn.new_state()
    attn(q, k, v, state=state)
    other = copy.deepcopy(state)
    other.crop(30)
    assert (state.seq_len, other.seq_len, state.base) == (40, 30, 16)
    assert isinstance(
        effattn.backend("linear", impl="reference").new_state(), effattn.states.full.FullState
    )
    with pytest.raises(ValueError, match=r"reference.* needs every key"):
        effattn.backend("linear", impl="reference")(q, k, v, state=state)


# Redrawing
# -------------------------------------------------------------------------------------------------


def test_redraw():
    attn, (q, k, v) = effattn.backend("performer", features=32), inputs(20)
    first, state = attn(q, k, v, state=(state := attn.new_state())), state
    before = attn.directions.clone()
    attn.redraw()
    assert not torch.equal(attn.directions, before)
    with pytest.raises(ValueError, match=r"performer: state: its sums were made before redraw\(\)"):
        attn(q, k, v, state=state)
    assert state.seq_len == 20
    state.reset()
    attn(q, k, v, state=state)
    attn.redraw(seed=0)
    assert torch.equal(attn.directions, before)
    torch.testing.assert_close(attn(q, k, v), first)


def test_the_state_dict_has_the_directions():
    attn, (q, k, v) = effattn.backend("performer", features=32, seed=5), inputs(20)
    expected = attn(q, k, v)
    fresh = effattn.backend("performer", features=32)
    fresh.load_state_dict(attn.state_dict())
    assert torch.equal(fresh(q, k, v), expected)
    with pytest.raises(RuntimeError, match="directions"):
        effattn.backend("performer", features=16).load_state_dict(attn.state_dict())
    hedgehog = effattn.backend("linear", feature_map="hedgehog")
    expected = hedgehog(q, k, v)
    fresh = effattn.backend("linear", feature_map="hedgehog")
    fresh.load_state_dict(hedgehog.state_dict())
    assert torch.equal(fresh(q, k, v), expected)


# In models
# -------------------------------------------------------------------------------------------------

SPECS = (
    "linear",
    "linear(feature_map='hedgehog')",
    "linear(feature_map='elu', decay='retnet')",
    "performer(features=64)",
)


@pytest.mark.parametrize("spec", SPECS)
def test_generation_in_a_model(spec, tokens):
    """Greedy, beams and left padding with a cache give what the whole sequence gives."""
    model = effattn.swap(tiny("llama", num_key_value_heads=4), spec)
    prompt = tokens[:42].clamp(min=1).view(1, 42)
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, **options, use_cache=False))
    beams = model.generate(prompt, **options, num_beams=2)
    assert torch.equal(beams, model.generate(prompt, **options, num_beams=2, use_cache=False))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(51) >= 9).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 9:], cached)


@pytest.mark.parametrize("spec", SPECS[1::2])
def test_assisted_generation(spec, tokens):
    model = effattn.swap(tiny("llama"), spec)
    draft = effattn.swap(tiny("llama", seed=1), "linear")
    options = dict(max_new_tokens=36, do_sample=False, eos_token_id=None)
    expected = model.generate(tokens[None, :40], **options)
    assert torch.equal(
        model.generate(tokens[None, :40], **options, assistant_model=draft), expected
    )
    assert torch.equal(
        model.generate(tokens[None, :40], **options, prompt_lookup_num_tokens=20), expected
    )


@pytest.mark.parametrize("spec", SPECS)
def test_checkpoints(spec, tokens, tmp_path):
    """What is learned, and the directions, come back bit for bit."""
    model = effattn.swap(tiny("llama", dtype=torch.float32), {"0": spec})
    for name, tensor in model.state_dict().items():
        if "map_" in name or "directions" in name:
            tensor.normal_()
    effattn.save(model, tmp_path / "out")
    again = effattn.load(tmp_path / "out")
    assert torch.equal(again(tokens[None, :30]).logits, model(tokens[None, :30]).logits)


def test_training_in_a_model(tokens):
    """Gradients reach the learned maps, with the cache that transformers makes by default."""
    model = effattn.swap(
        tiny("llama", dtype=torch.float32), "linear(feature_map='hedgehog')"
    ).train()
    model(tokens[None, :60], labels=tokens[None, :60]).loss.backward()
    learned = [p for name, p in model.named_parameters() if "map_" in name]
    assert len(learned) == 4
    assert all(p.grad.abs().sum() > 0 for p in learned)


def test_encoders_are_bidirectional(tokens):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=96,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    bert = BertModel(config).eval()
    dense = bert(tokens[None, :40]).last_hidden_state
    with torch.no_grad():
        effattn.swap(bert, "performer(features=2048)")
        assert relative(bert(tokens[None, :40]).last_hidden_state, dense) < 0.05
    with pytest.raises(Unsupported, match="layer 0: linear: decay"):
        effattn.swap(bert, "linear(decay=0.9)")


# Costs and bad input
# -------------------------------------------------------------------------------------------------


def test_cost():
    linear, performer = effattn.backend("linear"), effattn.backend("performer", features=256)
    shape = dict(batch=2, heads=8, kv_heads=8, head_dim=64)
    long, longer = (linear.cost(Shape(**shape, queries=t, keys=t)) for t in (8192, 32768))
    assert longer.flops == 4 * long.flops
    assert long.flops == 2 * 8 * 8192 * 2 * 2 * 64 * 64
    assert performer.cost(
        Shape(**shape, queries=8192, keys=8192)
    ).flops == 2 * 8 * 8192 * 2 * 2 * 256 * (64 + 64)
    near, far = (linear.cost(Shape(**shape, queries=1, keys=t)) for t in (1024, 65536))
    assert near == far  # one more token costs the same at any length
    held = 2 * 8 * (64 * 65 * 4 + 15 * 2 * 64 * 2)
    assert linear.cost(Shape(**shape, queries=1, keys=1024)).read_bytes > held
    tiny_pair = linear.cost(Shape(**shape, queries=2, keys=2))
    assert tiny_pair.flops == 2 * 8 * 3 * 2 * (64 + 64)  # three pairs are fewer than a sum
    back = linear.cost(Shape(**shape, queries=8192, keys=8192, backward=True))
    assert 2 * long.flops < back.flops < 3 * long.flops
    assert math.isclose(back.write_bytes, 3 * 2 * 8 * 8192 * 64 * 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"feature_map": "elo"}, "linear: feature_map: got 'elo' .did you mean 'elu'"),
        ("linear", {"feature_map": "identity"}, "either sign.*normalize=False"),
        (
            "linear",
            {"decay": 1.5},
            r"linear: decay: got 1.5, valid are None, 'retnet', a number in \(0, 1\]",
        ),
        ("linear", {"decay": [0.5, 0]}, "linear: decay: got 0, valid"),
        ("linear", {"decay": []}, "linear: decay: got an empty list"),
        ("linear", {"decay": "retne"}, "linear: decay: got 'retne'"),
        ("linear", {"decay": True}, "linear: decay: got True"),
        ("linear", {"normalize": 1}, "linear: normalize: got 1"),
        (
            "performer",
            {"features": 0},
            "performer: features: got 0, valid is a whole number of at least 1",
        ),
        (
            "performer",
            {"kernel": "softmx"},
            "performer: kernel: got 'softmx' .did you mean 'softmax'",
        ),
        ("performer", {"seed": -1}, "performer: seed: got -1"),
        ("performer", {"featurs": 3}, "performer: option: got 'featurs' .did you mean 'features'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        effattn.backend(name, **options)


def test_bad_calls():
    q, k, v = inputs(6)
    with pytest.raises(Unsupported, match=r"linear: decay .* causal=False is valid without decay"):
        effattn.backend("linear", decay=0.9)(q, k, v, causal=False)
    with pytest.raises(ValueError, match="decay: got 3 values, k has 2 key/value heads"):
        effattn.backend("linear", decay=[0.9, 0.8, 0.7])(q, k, v)
    attn = effattn.backend("performer", features=8)
    attn(q, k, v)
    state = attn.new_state()
    with pytest.raises(ValueError, match="expected heads of 16, as the directions are, got 8"):
        attn(*(x[..., :8] for x in (q, k, v)), state=state)
    assert state.seq_len == 0
    learned = effattn.backend("linear", feature_map="hedgehog")
    learned(q, k, v)
    with pytest.raises(
        ValueError, match="k: expected 2 heads of 16, as map_k has learned, got 4 of 16"
    ):
        learned(q, q, q)
    with pytest.raises(ValueError, match="performer: redraw: seed"):
        attn.redraw(-3)
    assert isinstance(state, RecurrentState)
