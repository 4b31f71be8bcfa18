"""The backend lsh: what a query sees, its state, convergence to exact attention, and its life
inside of a model.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import effattn
from effattn.conformance import check, inputs, relative
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.hf.state_layer import StateLayer
from effattn.interface import Shape
from effattn.states.buckets import BucketState
from effattn.states.full import ROLLBACK

SMALL = "lsh(rounds=2, buckets=2, chunk=1)"  # its rings hold 74 tokens
PRIMES = (1, 2, 3, 5, 7, 11, 13, 29, 53)


@pytest.mark.parametrize("causal", [True, False])
def test_shared_qk_keeps_to_the_contract(causal):
    attn = effattn.backend("lsh", rounds=2, buckets=4, chunk=2, shared_qk=True, impl="torch")
    check(
        attn,
        causal=causal,
        sizes=(3, 2, 2, 16),
        lengths=(1, 2, 5, 37),
    )


def test_prime_lengths():
    check(
        "lsh(rounds=3, buckets=6, chunk=4, impl='torch')",
        lengths=PRIMES,
        properties=("accuracy", "padding"),
    )


@pytest.mark.parametrize("buckets", [2, 8])
def test_the_future_moves_no_border(buckets):
    """The paper's flaw: later tokens in a bucket shift the chunks of earlier ones, here by as many
    as there can be.
    """
    attn = effattn.backend("lsh", rounds=3, buckets=buckets, chunk=8)
    q, k, v = inputs(512, sizes=(1, 2, 1, 16))
    before = attn(q, k, v)
    for cut in (100, 257, 511):
        # all of the future in one bucket
        for same in (k[:, :, :1], -k[:, :, :1], torch.randn(1, 1, 1, 16)):
            later = torch.cat([k[:, :, :cut], same.expand(-1, -1, 512 - cut, -1)], dim=2)
            other = torch.cat([q[:, :, :cut], q[:, :, cut:] * -5], dim=2)
            assert torch.equal(attn(other, later, v)[:, :, :cut], before[:, :, :cut])


def test_a_longer_sequence_begins_with_the_shorter_one():
    attn = effattn.backend("lsh", chunk=8)
    q, k, v = inputs(400, torch.float64)
    torch.testing.assert_close(
        attn(q, k, v)[:, :, :77], attn(q[:, :, :77], k[:, :, :77], v[:, :, :77])
    )


def error(tokens=192, causal=True, **options) -> float:
    q, k, v = inputs(tokens, torch.float64)
    exact = effattn.backend("dense")(q, k, v, causal=causal)
    return relative(effattn.backend("lsh", **options)(q, k, v, causal=causal), exact)


@pytest.mark.parametrize("causal", [True, False])
def test_error_falls_with_rounds_and_chunk(causal):
    by_rounds = [
        error(
            rounds=r,
            buckets=8,
            chunk=16,
            causal=causal,
        )
        for r in (1, 2, 4, 8, 16, 32)
    ]
    assert all(after < before for before, after in pairwise(by_rounds))
    assert by_rounds[-1] < 0.2 * by_rounds[0]
    by_chunk = [
        error(
            rounds=2,
            buckets=4,
            chunk=c,
            causal=causal,
        )
        for c in (4, 16, 64)
    ]
    assert by_chunk[0] > by_chunk[1] > by_chunk[2]


@pytest.mark.parametrize("causal", [True, False])
def test_equals_exact_attention_when_every_pair_is_covered(causal):
    """Keys that overlap between rounds would count several times if they were not corrected: these
    all do.
    """
    assert error(rounds=40, buckets=2, chunk=256, causal=causal) < 1e-12
    q, k, v = inputs(64, torch.float64)
    one_bucket = k.abs() + 3 * torch.ones_like(k)  # with the first rotation that has positive sums
    attn = effattn.backend("lsh", rounds=5, buckets=2, chunk=64)
    attn(q, k, v)
    attn.rotations.abs_()
    exact = effattn.backend("dense")(q.abs(), one_bucket, v, causal=causal)
    torch.testing.assert_close(attn(q.abs(), one_bucket, v, causal=causal), exact)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, second = (effattn.backend("lsh", seed=3) for _ in range(2))
    other = effattn.backend("lsh")
    q, k, v = inputs(9)
    assert torch.equal(first(q, k, v), second(q, k, v))
    other(q, k, v)
    assert torch.equal(first.rotations, second.rotations)
    assert not torch.equal(first.rotations, other.rotations)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_moves_no_bucket():
    attn = effattn.backend("lsh")
    q, k, v = inputs(100)
    attn(q, k, v)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(copy.deepcopy(attn).to(dtype).rotations.float(), attn.rotations)


def test_a_fresh_backend_loads_the_rotations():
    attn, fresh = effattn.backend("lsh", seed=5), effattn.backend("lsh")
    q, k, v = inputs(200)
    expected = attn(q, k, v)
    fresh.load_state_dict(attn.state_dict())
    assert torch.equal(fresh(q, k, v), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: got 0"),
        ({"chunk": -1}, "chunk: got -1"),
        ({"buckets": 0}, "buckets: got 0"),
        ({"buckets": 7}, "buckets: got 7.*valid is 6 or 8"),
        ({"rounds": 1.5}, "rounds: got 1.5"),
        ({"seed": -1}, "seed: got -1"),
        ({"shared_qk": "yes"}, "shared_qk: got 'yes'"),
        ({"bucket": 4}, "did you mean 'buckets'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        effattn.backend("lsh", **options)


def test_bad_calls():
    attn = effattn.backend("lsh", shared_qk=True)
    q, k, v = inputs(6)
    with pytest.raises(
        Unsupported, match="shared_qk=True needs a key for every query, got 4 heads of q and 2 of k"
    ):
        attn(q, k, v)
    attn = effattn.backend("lsh")
    attn(q, k, v)
    with pytest.raises(ValueError, match="heads of 8, lsh's rotations are for 16"):
        attn(q[..., :8], k[..., :8], v)
    state = attn.new_state()
    attn(q, k, v, state=state)
    with pytest.raises(
        ValueError, match="q: got 6 tokens, with a state valid are at most the 2 new keys"
    ):
        attn(q, k[:, :, :2], v[:, :, :2], state=state)
    assert state.seq_len == 6
    with pytest.raises(Unsupported, match="causal=False"):
        attn(q, k, v, causal=False, state=state)


# The state
# -------------------------------------------------------------------------------------------------

moves = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 5, 16, 17, 40])),
    st.tuples(st.just("crop"), st.integers(1, ROLLBACK)),
    st.tuples(st.just("reorder"), st.permutations(range(3))),
    st.tuples(st.just("copy"), st.just(0)),
)
SPECS = (
    SMALL,
    "lsh(rounds=3, buckets=2, chunk=3)",
    "lsh(rounds=1, buckets=4, chunk=2)",
    "lsh(rounds=2, buckets=2, chunk=1, shared_qk=True)",
)


@settings(deadline=None, max_examples=60)
@given(
    spec=st.sampled_from(SPECS),
    moves=st.lists(moves, max_size=12),
    start=st.sampled_from([3, 70, 130]),
    pads=st.sampled_from([0, 0, 3, 30]),
    seed=st.integers(0, 99),
)
def test_a_state_is_all_that_is_needed(spec, moves, start, pads, seed):
    attn, truth = effattn.backend(spec, impl="torch"), effattn.backend(spec, impl="reference")
    draw, heads = torch.Generator().manual_seed(seed), 2 if "shared" in spec else 4

    def new(n):
        return [torch.randn(3, h, n, 8, generator=draw, dtype=torch.float64) for h in (heads, 2, 2)]

    state, past, order, highest = attn.new_state(), new(0), torch.arange(3), 0
    for move, n in [("append", start), *moves, ("append", 3)]:
        if move == "append":
            tokens = new(n)
            past = [torch.cat(pair, dim=2) for pair in zip(past, tokens, strict=True)]
            mask = None
            if pads:
                mask = (
                    torch.arange(past[1].shape[2])[None]
                    >= (torch.arange(3) * pads // 2)[order][:, None]
                )
            out = attn(*tokens, padding_mask=mask, state=state)
            torch.testing.assert_close(out, truth(*past, padding_mask=mask)[:, :, -n:])
            assert state.seq_len == past[1].shape[2]
        elif move == "crop":
            highest = max(highest, state.seq_len)
            n = max(1, state.seq_len - n, highest - ROLLBACK)
            state.crop(n)
            past = [x[:, :, :n] for x in past]
        elif move == "reorder":
            state.reorder(torch.tensor(n))
            past, order = [x[list(n)] for x in past], order[list(n)]
        else:
            state = copy.deepcopy(state)


def test_memory_is_what_cost_says_and_bounded():
    attn = effattn.backend(SMALL, impl="torch")
    held = []
    for tokens in (1, 50, 73, 74, 75, 300):
        q, k, v = inputs(tokens, sizes=(2, 4, 2, 16))
        state = attn.new_state()
        attn(q, k, v, state=state)
        held.append(state.nbytes)
        assert state.nbytes == attn.cost(Shape(2, 4, 2, tokens, tokens, 16, itemsize=4)).state_bytes
        for _ in range(20):
            attn(
                q[:, :, -1:],
                k[:, :, -1:],
                v[:, :, -1:],
                state=state,
            )
        more = tokens + 20
        assert state.nbytes == attn.cost(Shape(2, 4, 2, 1, more, 16, itemsize=4)).state_bytes
    assert held[0] == held[1] < held[2] == held[5]


def test_crop_refuses_what_was_overwritten():
    attn = effattn.backend(SMALL, impl="torch")
    q, k, v = inputs(100, sizes=(1, 4, 2, 16))
    state = attn.new_state()
    attn(
        q[:, :, :60],
        k[:, :, :60],
        v[:, :, :60],
        state=state,
    )
    state.crop(7)  # all is still there
    torch.testing.assert_close(
        attn(q[:, :, 7:60], k[:, :, 7:60], v[:, :, 7:60], state=state), attn(q, k, v)[:, :, 7:60]
    )
    attn(
        q[:, :, 60:],
        k[:, :, 60:],
        v[:, :, 60:],
        state=state,
    )
    with pytest.raises(ValueError, match=r"crop: got 83.*valid are 0 and 84 to 100"):
        state.crop(83)
    state.crop(90)
    with pytest.raises(ValueError, match="valid are 0 and 84 to 90"):
        state.crop(80)
    state.crop(84)
    torch.testing.assert_close(
        attn(q[:, :, 84:], k[:, :, 84:], v[:, :, 84:], state=state), attn(q, k, v)[:, :, 84:]
    )


def test_gradients_through_a_state():
    attn = effattn.backend(SMALL, impl="torch")
    given = [x.requires_grad_() for x in inputs(120, torch.float64, sizes=(1, 2, 2, 8))]
    state = attn.new_state()
    parts = [
        attn(*(x[:, :, a:b] for x in given), state=state)
        for a, b in (
            (0, 80),
            (80, 90),
            (90, 120),
        )
    ]
    whole = attn(*given)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    loss = torch.randn_like(whole)
    got = torch.autograd.grad((torch.cat(parts, dim=2) * loss).sum(), given)
    torch.testing.assert_close(got, torch.autograd.grad((whole * loss).sum(), given))


def test_rotary_with_a_state():
    """Buckets are told from rotated keys, in a state too."""
    from effattn.positions.rope import Rope

    attn, rope = effattn.backend("lsh", rounds=2, buckets=4, chunk=3), Rope(0.3 ** torch.arange(8))
    q, k, v = inputs(60, torch.float64)
    mask = torch.ones(3, 60, dtype=torch.bool)
    mask[1, :7] = False
    for padding in (None, mask):
        whole, state = attn(q, k, v, padding_mask=padding, rotary=rope), attn.new_state()
        for a, b in ((0, 31), (31, 32), (32, 60)):
            part = [x[:, :, a:b] for x in (q, k, v)]
            out = attn(
                *part,
                padding_mask=None if padding is None else padding[:, :b],
                state=state,
                rotary=rope,
            )
            torch.testing.assert_close(out, whole[:, :, a:b])


# In a model
# -------------------------------------------------------------------------------------------------


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, **options
    )


@pytest.mark.parametrize("spec", ["lsh(rounds=2, buckets=4, chunk=3)", SMALL])
def test_generation(spec):
    model = effattn.swap(tiny("qwen3", num_key_value_heads=2), spec)
    tokens = torch.randint(3, 96, (3, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    batch = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    expected = generate(model, batch, use_cache=False)
    assert torch.equal(generate(model, batch), expected)
    assert torch.equal(
        generate(model, batch, num_beams=2), generate(model, batch, num_beams=2, use_cache=False)
    )
    one = {name: x[2:] for name, x in batch.items()}
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=4), expected[2:])
    alone = {name: x[:1, 9:] for name, x in batch.items()}
    assert torch.equal(generate(model, alone)[0], expected[0, 9:])
    cache = new_cache(model)
    assert all(
        isinstance(layer, StateLayer) and isinstance(layer.state, BucketState)
        for layer in cache.layers
    )


def test_swap_save_load_restore(tmp_path):
    model, tokens = tiny("llama", dtype=torch.float32), torch.arange(3, 90)[None]
    plain = model(tokens).logits
    effattn.swap(model, "lsh(rounds=2, buckets=4, chunk=3, seed=4)")
    expected = model(tokens).logits
    assert not torch.allclose(expected, plain)
    effattn.save(model, tmp_path / "out")
    loaded = effattn.load(tmp_path / "out")
    names = [name for name in loaded.state_dict() if name.endswith("rotations")]
    assert len(names) == 2
    assert torch.equal(loaded(tokens).logits, expected)
    effattn.restore(model)
    assert torch.equal(model(tokens).logits, plain)


def test_shared_qk_is_refused_by_models_with_fewer_kv_heads():
    with pytest.raises(Unsupported, match="layer 0: lsh: shared_qk=True"):
        effattn.swap(tiny("qwen3", num_key_value_heads=2), "lsh(shared_qk=True)")
