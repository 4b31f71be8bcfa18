"""States against an oracle that keeps everything: any chunks, any rollback, any reordering."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn.conformance import inputs
from effattn.registry import backend
from effattn.states.full import ROLLBACK, ROOM, FullState, RingState

SPECS = (
    "dense",
    "sliding(window=6)",
    "sliding(window=5, sinks=3)",
    "sliding(window=2, sinks=40)",
    "block(block=7)",
    "sliding(window=3, dilation=3)",
    "fixed(stride=6, summary=2)",
    "s2(block=6)",
    "strided(stride=5)",
    "longnet(segments=[4, 12], dilations=[1, 2])",
    "longformer(window=5, global_tokens=3)",
    "longformer(window=5, global_tokens=[1, 9])",
)


def qkv(batch: int, tokens: int, draw: torch.Generator):
    return [
        torch.randn(batch, h, tokens, 4, generator=draw, dtype=torch.float64) for h in (4, 2, 2)
    ]


moves = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 5, 16, 17, 40])),
    st.tuples(st.just("crop"), st.integers(1, ROLLBACK)),
    st.tuples(st.just("reorder"), st.permutations(range(3))),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


@settings(deadline=None, max_examples=150)
@given(
    spec=st.sampled_from(SPECS),
    moves=st.lists(moves, max_size=14),
    pads=st.sampled_from([0, 0, 3, 30]),
    seed=st.integers(0, 99),
)
def test_a_state_is_all_that_is_needed(spec, moves, pads, seed):
    attn, draw = backend(spec, impl="torch"), torch.Generator().manual_seed(seed)
    truth = backend(spec, impl="reference")
    state, past = attn.new_state(), qkv(3, 0, draw)
    order, highest = torch.arange(3), 0
    for move, n in [("append", 20), *moves, ("append", 3)]:
        if move == "append":
            new = qkv(3, n, draw)
            past = [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)]
            mask = None
            if pads:
                start = (torch.arange(3) * pads // 2)[order]
                mask = torch.arange(past[1].shape[2])[None] >= start[:, None]
            out = attn(*new, padding_mask=mask, state=state)
            expected = truth(*past, padding_mask=mask)[:, :, -n:]
            torch.testing.assert_close(out, expected)
        elif move == "crop":
            highest = max(highest, state.seq_len)
            n = max(1, state.seq_len - n, highest - ROLLBACK)
            if state.seq_len and not (pads and n < 34 and "longformer" in spec):
                state.crop(n)
                past = [x[:, :, :n] for x in past]
        elif move == "reorder" and state.seq_len:
            state.reorder(torch.tensor(n))
            past = [x[n] for x in past]
            order = order[n]
        elif move == "copy":
            state = copy.deepcopy(state)
        elif move == "reset":
            state.reset()
            past, highest = [x[:, :, :0] for x in past], 0
        assert state.seq_len == past[0].shape[2]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [1, 16, 30, 200])
def test_declared_bytes_are_held_however_the_tokens_came(spec, tokens):
    attn = backend(spec, impl="torch")
    held = []
    for chunk in (tokens, 1, 7):
        state = attn.new_state()
        for at in range(0, tokens, chunk):
            attn(*qkv(3, min(chunk, tokens - at), torch.Generator()), state=state)
        held.append(state.nbytes)
    assert held == [attn.held(tokens) * 3 * 2 * (4 + 4) * 8] * 3


def test_a_ring_is_bounded_and_never_moved():
    attn, state = backend("sliding(window=8, sinks=2)"), None
    state = attn.new_state()
    for _ in range(100):
        attn(*qkv(1, 1, torch.Generator()), state=state)
    address = state.k.data_ptr()
    for _ in range(50):
        attn(*qkv(1, 1, torch.Generator()), state=state)
    assert state.k.data_ptr() == address
    assert state.k.shape[2] == 2 + 8 + ROLLBACK
    assert state.seq_len == 150


def test_rollback_beyond_the_ring_is_refused():
    state = RingState(5)
    x = torch.zeros(1, 1, 1, 2)
    for _ in range(60):
        state.append(x, x)
    with pytest.raises(ValueError, match=r"crop: got 40, .*evicted; valid are 0 and 43 to 60"):
        state.crop(40)
    with pytest.raises(ValueError, match="valid is 0 to 60"):
        state.crop(61)
    assert state.seq_len == 60
    state.crop(43)
    state.crop(0)
    assert (state.seq_len, state.nbytes) == (0, 0)
    state.append(x, x)
    with pytest.raises(ValueError, match="the state holds"):
        state.append(x.double(), x.double())


def test_gradients_flow_through_a_state():
    attn = backend("sliding(window=4, sinks=1)", impl="torch")
    q, k, v = (x.requires_grad_() for x in qkv(1, 50, torch.Generator()))
    expected = torch.autograd.grad(attn(q, k, v).square().sum(), (q, k, v))
    state = attn.new_state()
    parts = [
        attn(*(x[:, :, a:b] for x in (q, k, v)), state=state)
        for a, b in ((0, 20), (20, 24), (24, 50))
    ]
    got = torch.autograd.grad(torch.cat(parts, dim=2).square().sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_full_state_grows_in_place():
    """A step writes its own token only; what was handed out or came in before stays as it was."""
    draw, state = torch.Generator().manual_seed(0), FullState()
    prompt = torch.randn(2, 3, 10, 4, generator=draw)
    state.append(prompt[:, :, :7], prompt[:, :, :7] + 1)  # a view of more
    new = torch.randn(2, 3, 3 * ROOM, 4, generator=draw)
    kept, handed, addresses = prompt.clone(), [], []
    for at in range(new.shape[2]):
        token = new[:, :, at : at + 1]
        handed.append(state.append(token, token + 1)[0])
        addresses.append(state.k.data_ptr())
        assert state.nbytes == 2 * (8 + at) * 2 * 3 * 4 * 4
    want = torch.cat([kept[:, :, :7], new], dim=2)
    assert len(set(addresses)) == 3
    assert torch.equal(prompt, kept)
    assert torch.equal(state.k, want)
    assert torch.equal(state.v, want + 1)
    state.crop(20)
    state.append(new[:, :, :1], new[:, :, :1])
    twin = copy.deepcopy(state)
    state.append(new[:, :, 1:2], new[:, :, 1:2])
    twin.append(new[:, :, 2:3], new[:, :, 2:3])
    assert torch.equal(state.k, torch.cat([want[:, :, :20], new[:, :, :2]], dim=2))
    assert torch.equal(twin.k, torch.cat([want[:, :, :20], new[:, :, :1], new[:, :, 2:3]], dim=2))
    for at, k in enumerate(handed):
        assert torch.equal(k, want[:, :, : 8 + at])


def test_a_full_state_goes_on_in_and_out_of_inference_mode_and_with_gradients():
    state, x = FullState(), torch.randn(1, 1, 1, 2)
    with torch.inference_mode():
        for _ in range(3):
            state.append(x, x)
    with torch.no_grad():
        state.append(x, x)
        state.append(x, x)
    grown, learned = state.append(x, x)[0], x.clone().requires_grad_()
    after = state.append(learned, learned)[0]
    (state.append(learned, learned)[0].sum() + after.sum()).backward()
    assert learned.grad.tolist() == [[[[3.0, 3.0]]]]
    assert torch.equal(state.k.detach(), x.expand(1, 1, 8, 2))
    assert torch.equal(grown, x.expand(1, 1, 6, 2))


def test_a_state_is_copied_without_the_rule_that_its_last_call_had():
    attn = backend("dense")
    state = attn.new_state()
    rule = lambda q, k, at_q, at_k: (q, k)  # noqa: E731 - nothing that can be pickled
    q, k, v = inputs(9, torch.float64, sizes=(1, 2, 2, 8))
    for at in (slice(0, 6), slice(6, 7), slice(7, 8)):
        attn(*(x[:, :, at] for x in (q, k, v)), state=state, rotary=rule)
    last = [x[:, :, 8:] for x in (q, k, v)]
    again = [pickle.loads(pickle.dumps(state)), copy.deepcopy(state), state]
    first, *others = (attn(*last, state=one, rotary=rule) for one in again)
    assert all(torch.equal(first, other) for other in others)
