"""The backend topk: what it is equal to, its state, what it refuses, and its life inside of a
model."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn.conformance import check, inputs, relative
from effattn.errors import Unsupported
from effattn.evaluate import passkey
from effattn.hf.cache import new_cache
from effattn.kernels.flash.reference import rotary_scores
from effattn.linearizing.inputs import exact, projections_of
from effattn.positions.registry import rule
from effattn.states.blocks import BlockState
from effattn.surgery.checkpoint import load_model


def test_a_block_of_one_is_exact_knn_attention():
    q, k, v = inputs(60, torch.float64, sizes=(2, 3, 3, 8))
    got = effattn.backend("topk", window=4, block=1, blocks=5)(q, k, v)
    scores = q @ k.mT * 8**-0.5
    i, j = torch.arange(60)[:, None], torch.arange(60)
    far = scores.masked_fill(i - j < 4, -torch.inf)
    nearest = far >= far.topk(5, dim=3).values[..., 4:]
    seen = ((i - j < 4) & (j <= i)) | (nearest & far.isfinite())
    expected = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=3) @ v
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("summary", ["mean", "minmax", "spread", "learned"])
@pytest.mark.parametrize(("window", "sinks", "block"), [(8, 0, 8), (16, 3, 5), (1, 0, 1)])
def test_blocks_that_cover_everything_are_dense(window, sinks, block, summary):
    q, k, v = inputs(61, torch.float64)
    options = {"window": window, "sinks": sinks, "block": block, "blocks": 64}
    attn = effattn.backend("topk", summary=summary, **options)
    torch.testing.assert_close(attn(q, k, v), effattn.backend("dense")(q, k, v))


def test_the_heads_of_a_group_read_the_same_blocks():
    """By the sum of their scores: a head that would choose otherwise alone goes with the others."""
    q, k, v = inputs(64, torch.float64, sizes=(1, 4, 1, 8))
    attn = effattn.backend("topk", window=4, block=4, blocks=2)
    together = attn(q, k, v)
    mean = attn(q.mean(dim=1, keepdim=True), k, v)
    assert relative(attn(q[:, :1], k, v), together[:, :1]) > 0.01
    loud = torch.cat([q[:, :1] * 1e-9, q[:, 1:2].expand(-1, 3, -1, -1)], dim=1)
    alone = attn(q[:, 1:2], k, v)
    torch.testing.assert_close(attn(loud, k, v)[:, 1:2], alone)
    assert mean.isfinite().all()


def test_a_block_counts_only_once_it_is_finished():
    q, k, v = inputs(32, torch.float64)
    attn = effattn.backend("topk", window=1, block=8, blocks=4)
    before = attn(q, k, v)
    other = v.clone()
    other[:, :, 24:31] = 100.0  # of the last block, whose last key comes with the last query
    assert torch.equal(attn(q, k, other)[:, :, :24], before[:, :, :24])
    assert not torch.allclose(attn(q, k, other)[:, :, 31], before[:, :, 31])


def test_a_step_reads_its_window_its_blocks_and_the_summaries():
    attn = effattn.backend(
        "topk",
        window=64,
        sinks=4,
        block=16,
        blocks=8,
    )
    step = effattn.Shape(
        1,
        8,
        2,
        1,
        4096,
        64,
    )
    read, token = attn.cost(step).read_bytes, 2 * (64 + 64) * 2
    assert read == 8 * 64 * 2 + (64 + 4 + 8 * 16) * token + 256 * 2 * 64 * 4
    assert read < 0.15 * effattn.backend("dense").cost(step).read_bytes


def test_the_state_says_what_it_holds():
    attn = effattn.backend(
        "topk",
        window=4,
        block=4,
        blocks=2,
        summary="minmax",
    )
    q, k, v = inputs(22, torch.bfloat16)
    state = attn.new_state()
    attn(q, k, v, state=state)
    assert isinstance(state, BlockState)
    assert state.summaries.shape == (3, 2, 5, 32)
    assert state.summaries.dtype == torch.float32
    assert state.nbytes == k.nbytes + v.nbytes + 3 * 2 * 5 * 32 * 4
    state.crop(9)
    assert state.summaries.shape[2] == 2


@pytest.mark.parametrize("summary", ["mean", "minmax", "spread", "learned"])
def test_prime_sizes_keep_to_the_contract(summary):
    check(
        f"topk(window=7, sinks=1, block=5, blocks=3, summary='{summary}', impl='torch')",
        lengths=(1, 5, 11, 29, 53),
        properties=("accuracy", "padding", "decode", "future", "state_moves"),
    )


def test_a_learned_summary_starts_as_the_mean_and_learns_from_any_loss():
    q, k, v = inputs(64)
    learned = effattn.backend(
        "topk",
        window=8,
        block=4,
        blocks=2,
        summary="learned",
    )
    mean = effattn.backend("topk", window=8, block=4, blocks=2)
    torch.testing.assert_close(learned(q, k, v), mean(q, k, v))
    assert learned.traits.learned
    assert not mean.traits.learned
    learned(q, k, v).sum().backward()
    assert learned.pool.grad.abs().sum() > 0
    other = effattn.backend(
        "topk",
        window=8,
        block=4,
        blocks=2,
        summary="learned",
    )
    with torch.no_grad():
        learned.pool += torch.randn(2, 16)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other(q, k, v), learned(q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "topk: window: got 0"),
        ({"window": 8, "block": 0}, "topk: block: got 0"),
        ({"window": 8, "blocks": 1.5}, "topk: blocks: got 1.5"),
        ({"window": 8, "sinks": -1}, "topk: sinks: got -1"),
        ({"window": 8, "summary": "means"}, "summary: .*did you mean 'mean'"),
        ({}, "topk: window must be given"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        effattn.backend("topk", **options)


def test_what_it_cannot_do_is_refused():
    q, k, v = inputs(9)
    attn = effattn.backend("topk", window=4)
    with pytest.raises(Unsupported, match="causal=False is not possible"):
        attn(q, k, v, causal=False)
    with pytest.raises(ValueError, match="softcap"):
        attn(q, k, v, softcap=30.0)
    clipped = rule("rerope(window=3)", head_dim=16, heads=4, length=32)
    with torch.no_grad(), pytest.raises(Unsupported, match="valid is its own growing state"):
        attn(q, k, v, state=attn.static_state(16), rotary=clipped)
    learned = effattn.backend(
        "topk",
        window=4,
        summary="learned",
        kv_heads=1,
        head_dim=16,
    )
    with pytest.raises(ValueError, match="expected 1 heads of size 16"):
        learned(q, k, v)


def test_it_lives_in_a_model():
    """Greedy, beams, and a batch with padding, through the cache of generate()."""
    model = tiny("llama")
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    effattn.swap(
        model,
        "topk",
        window=6,
        sinks=1,
        block=4,
        blocks=2,
    )
    whole = model(ids).logits
    cache = new_cache(model)
    parts = [
        model(ids[:, low:high], past_key_values=cache).logits
        for low, high in ((0, 21), (21, 22), (22, 40))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    both = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 9:], **options)
    assert torch.equal(both[1, 9:], alone[0])
    model.generate(ids, num_beams=3, **options)
    assert "topk(window=6" in str(effattn.describe(model))


# The embedded model, untrained
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return load_model("embedded")


def test_the_error_on_the_embedded_model_is_small(embedded):
    """RMS(error) / RMS(exact) by layer, window 64 and 8 blocks of 16 at 512 tokens; the window
    alone has three times as much at least."""
    model, tokenizer = embedded
    ids = effattn.embedded.tokens("validation", 2048, tokenizer=tokenizer)
    window = effattn.backend("sliding", window=64)
    attn = effattn.backend("topk", window=64, block=16, blocks=8)
    found = projections_of(model, ids[None, -512:], range(4))
    for (q, k, v), most in zip(found.values(), (0.045, 0.006, 0.09, 0.12), strict=True):
        truth = exact(q, k, v, True)
        assert relative(attn(q, k, v), truth) < most
        assert relative(attn(q, k, v), truth) < 0.34 * relative(window(q, k, v), truth)


def test_a_passkey_beyond_the_window_is_known_almost_as_well_as_to_dense_attention(embedded):
    """In nats of the key's tokens, through the cache: the model is too small to say all of them."""
    model, tokenizer = embedded
    asked = {"length": 400, "depths": (0.3,), "trials": 6, "style": "code"}
    found = {}
    for spec in ("dense", "topk(window=64, block=16, blocks=8)", "sliding(window=64, sinks=4)"):
        effattn.swap(model, spec)
        found[spec.split("(")[0]] = passkey(model, tokenizer, **asked)["rows"][0]["nats"]
        effattn.restore(model)
    assert found["topk"] < found["dense"] + 0.4
    assert found["sliding"] > found["dense"] + 1.5


# ---- far keys at one position


def clipped(spec="rerope(window=6)"):
    return rule(spec, head_dim=16, heads=4, length=32)


def clipped_by_hand(q, k, v, window, sinks, block, blocks, near):
    """Pair by pair: RoPE below `near`, from there on the query at position `near` and the key at 0;
    blocks by the mean of raw keys against that query, summed over a group."""
    made, tokens, group = clipped(), q.shape[2], q.shape[1] // k.shape[1]
    angles, _ = made.rotation.frequencies(made.trained)
    at = torch.full((tokens,), near)
    far = made.rope().turn(q, at)
    keys = k.repeat_interleave(group, dim=1)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    scores = rotary_scores(q, keys, i - j, angles, window=near)
    seen = ((i - j < window) & (j <= i)) | ((j < sinks) & (j <= i))
    seen = seen.expand(*q.shape[:2], -1, -1).clone()
    means = k[:, :, : tokens // block * block].unflatten(2, (-1, block)).mean(3)
    for row in range(q.shape[0]):
        for head in range(k.shape[1]):
            own = slice(head * group, (head + 1) * group)
            for t in range(tokens):
                free = [
                    n
                    for n in range((t + 1) // block)
                    if not seen[row, head * group, t, n * block : (n + 1) * block].all()
                ]
                marks = [(far[row, own, t].sum(0) @ means[row, head, n]).item() for n in free]
                for n in sorted(free, key=lambda n: -marks[free.index(n)])[:blocks]:
                    seen[row, own, t, n * block : (n + 1) * block] = True
    weights = (scores * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ v.repeat_interleave(group, dim=1)


CLIPPED = {"window": 9, "sinks": 2, "block": 4, "blocks": 2}


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_far_keys_stand_at_one_position(impl):
    q, k, v = inputs(50, torch.float64, sizes=(2, 4, 2, 16))
    true = clipped_by_hand(q, k, v, *CLIPPED.values(), near=6)
    attn = effattn.backend("topk", **CLIPPED, impl=impl)
    assert relative(attn(q, k, v, rotary=clipped()), true) < 1e-6
    grads = []
    for run in (
        lambda *x: attn(*x, rotary=clipped()),
        lambda *x: clipped_by_hand(*x, *CLIPPED.values(), near=6),
    ):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(run(*given).square().sum(), given))
    for got, expected in zip(*grads, strict=True):
        assert relative(got, expected) < 1e-5
    # what covers everything is ReRoPE
    everything = effattn.backend("topk", window=9, block=4, blocks=50, impl=impl)
    dense = effattn.backend("dense")(q, k, v, rotary=clipped())
    assert relative(everything(q, k, v, rotary=clipped()), dense) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", ["rerope(window=6)", "rerope(window=9)+logn", "yarn(factor=4)+rerope(window=4)"]
)
@pytest.mark.parametrize("summary", ["mean", "minmax", "learned"])
def test_far_keys_in_steps_chunks_and_padding(spec, summary):
    q, k, v = inputs(50, torch.float64, sizes=(2, 4, 2, 16))
    attn = effattn.backend("topk", **CLIPPED, summary=summary)
    whole = attn(q, k, v, rotary=clipped(spec))
    for cuts in ((30, 31, 32, 50), (1, 20, 45, 50)):
        state, low, outs = attn.new_state(), 0, []
        for high in cuts:
            part = (x[:, :, low:high] for x in (q, k, v))
            outs.append(attn(*part, state=state, rotary=clipped(spec)))
            low = high
        assert relative(torch.cat(outs, dim=2), whole) < 1e-6
    for low, high in ((0, 7), (44, 50)):
        mask = torch.ones(2, 50, dtype=torch.bool)
        mask[0, low:high] = False
        padded = attn(q, k, v, rotary=clipped(spec), padding_mask=mask)
        alone = attn(*(x[:1, :, mask[0]] for x in (q, k, v)), rotary=clipped(spec))
        assert relative(padded[:1, :, mask[0]], alone) < 1e-6
        assert relative(padded[1:], whole[1:]) < 1e-6


@torch.no_grad()
def test_far_keys_in_a_live_model_and_what_is_refused():
    tokens = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    spec = "topk(window=9, sinks=2, block=4, blocks=2)"
    model = effattn.swap(tiny("llama"), spec, positions="rerope(window=6)").eval()
    got = model.generate(tokens, max_new_tokens=6, do_sample=False)
    again = model(got[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(again[:, 39:], got[:, 40:])
    for positions in ("rerope(window=10)", "leaky_rerope(window=6, k=2)", "alibi"):
        with pytest.raises(Unsupported, match="need an exact pattern, which topk is not"):
            effattn.swap(tiny("llama"), spec, positions=positions)
    with pytest.raises(Unsupported, match="with topk rerope too, clipped within its window"):
        effattn.backend(spec)(*inputs(20), rotary=clipped("rerope(window=10)"))
