"""Packed states against the definition: softmax over what is stored; any chunks, any rollback,
exact bytes.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn.errors import Unsupported
from effattn.kernels.decode import packed
from effattn.kernels.pack import pack, unpack
from effattn.positions import Rope
from effattn.profiling.memory import PeakMemory
from effattn.quant.formats import Format
from effattn.quant.packed.kind import Packed
from effattn.quant.packed.ring import PackedRing
from effattn.quant.packed.state import PackedState
from effattn.registry import backend
from effattn.states.full import ROLLBACK

H, HKV, D = 4, 2, 32
ROPE = Rope(100.0 ** (-torch.arange(0, D, 2) / D))
PATTERNS = (
    "dense",
    "sliding(window=40)",
    "sliding(window=37, sinks=3)",
    "block(block=24, look_back=1)",
)
FORMATS = (
    "int8(residual=16, group=32)",
    "int4(residual=0, group=32, first=2)",
    "int2(residual=40, group=32, v=4)",
    "int4(residual=8, k_axis='token', v_axis='channel', group=32)",
    "fp8(residual=0, group=32)",
)


def format_of(spec: str, dim: int = D) -> Format:
    return Format.parse(spec).fit(dim)[0]


def state_of(spec: str, pattern: str = "dense"):
    return Packed(spec, format_of(spec)).new_state(backend(pattern))


def qkv(batch: int, tokens: int, draw: torch.Generator, dtype=torch.float32):
    return [torch.randn(batch, h, tokens, D, generator=draw, dtype=dtype) for h in (H, HKV, HKV)]


def stored(x: torch.Tensor, coding, low: int, high: int) -> torch.Tensor:
    """x with the tokens numbered [low, high) as they are once they are packed."""
    return torch.cat(
        [x[:, :, :low], unpack(pack(x[:, :, low:high], coding), x.dtype), x[:, :, high:]], dim=2
    )


def expected(attn, state, q, past_k, past_v, new_k, new_v, border: int, rotary):
    """By definition. `border`: the tokens between the first ones and this number are packed."""
    low = min(state.format.first, border)
    k, v = stored(past_k, state.format.k, low, border), stored(past_v, state.format.v, low, border)
    k, v = torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)
    return attn(q, k, v, rotary=rotary)


moves = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([1, 1, 2, 16, 17, 70])),
    st.tuples(st.just("guess"), st.sampled_from([2, 9, 24])),
    st.tuples(st.just("crop"), st.integers(1, ROLLBACK)),
    st.tuples(st.just("rows"), st.permutations(range(3))),
    st.tuples(st.just("copy"), st.just(0)),
)


@settings(deadline=None, max_examples=12)
@given(
    spec=st.sampled_from(FORMATS),
    pattern=st.sampled_from(PATTERNS),
    moves=st.lists(moves, max_size=7),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_attention_over_what_is_stored(spec, pattern, moves, seed):
    attn, truth = backend(pattern, impl="torch"), backend(pattern, impl="reference")
    draw, state = torch.Generator().manual_seed(seed), state_of(spec, pattern)
    rotary = ROPE if "sinks" in pattern else None
    past = qkv(3, 0, draw)
    for move, n in [("append", 50), *moves, ("append", 3), ("append", 1)]:
        if move in ("append", "guess"):
            q, *new = qkv(3, n, draw)
            count, before = past[1].shape[2], state.stored
            last = min(n - 1, 8) if move == "guess" else 0
            state.candidates = last
            out = attn(q, *new, state=state, rotary=rotary)
            cuts = [0, *range(n - last, n), n] if last else [0, n]
            for low, high in pairwise(cuts):
                border = max(before, state.border(count + low)) if low else before
                seen = [
                    torch.cat([x, y[:, :, :low]], dim=2) for x, y in zip(past[1:], new, strict=True)
                ]
                mine = [x[:, :, low:high] for x in (q, *new)]
                wanted = expected(truth, state, mine[0], *seen, *mine[1:], border, rotary)
                torch.testing.assert_close(out[:, :, low:high], wanted, rtol=2e-4, atol=2e-4)
            past = [torch.cat(pair, dim=2) for pair in zip(past, (q, *new), strict=True)]
            if last:  # all that was guessed can be taken back
                state.crop(n := count + cuts[1])
                past = [x[:, :, :n] for x in past]
                assert state.stored == max(before, state.border(n))
        elif move == "crop":
            # a ring brings back no more than what it keeps beyond its window
            n = max(state.begin, state._least(), state.seq_len - n)
            state.crop(n)
            past = [x[:, :, :n] for x in past]
        elif move == "rows":
            state.reorder(torch.tensor(n))
            past = [x[n] for x in past]
        else:
            state = copy.deepcopy(state)
        assert state.seq_len == past[0].shape[2]
    state.reset()
    assert (state.seq_len, state.nbytes) == (0, 0)


@torch.no_grad()
@pytest.mark.parametrize("spec", FORMATS)
def test_bytes_allocated_are_bytes_predicted(spec):
    draw, attn = torch.Generator().manual_seed(0), backend("dense", impl="torch")
    for sizes in ((1, 2, 5), (300, 1, 1), (40, 17, 90, 1)):
        state = state_of(spec)
        for size in sizes:
            attn(*qkv(3, size, draw), state=state)
            first, coded, rest = state.format.held(state.seq_len)
            assert state.nbytes == state.format.nbytes(state.seq_len, HKV, D, itemsize=4, batch=3)
            assert sum(k.tokens for k, _ in state.pages) == coded
            assert state.rest[0].shape[2] == rest
            assert (state.first_kv[0].shape[2] if state.first_kv else 0) == first
    state, more = state_of(spec), state_of(spec)
    step = state.format.flush
    attn(*qkv(3, 5 * step, draw), state=state)
    attn(*qkv(3, 7 * step, draw), state=more)
    assert (more.nbytes - state.nbytes) / (2 * step) == 3 * state.format.bytes_per_token(HKV, D)


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_a_ring_is_bounded_and_never_moved(pattern):
    attn, state = backend(pattern, impl="torch"), state_of(FORMATS[0], pattern)
    draw = torch.Generator().manual_seed(0)
    assert type(state) is PackedRing
    attn(*qkv(2, 200, draw), state=state, rotary=ROPE if "sinks" in pattern else None)
    address = [x.data_ptr() for codes in state.pages[0] for x in codes.tensors()]
    for _ in range(70):
        attn(*qkv(2, 1, draw), state=state, rotary=ROPE if "sinks" in pattern else None)
        assert state.nbytes == state.predicted_bytes(state.seq_len, 2, HKV, D, 4)
    assert [x.data_ptr() for codes in state.pages[0] for x in codes.tensors()] == address
    assert state.size <= state.keep + ROLLBACK + state.format.flush


LONG = "int8(group=128, residual=512)"  # longer than any of the windows
RINGS = [(1, 0), (7, 0), (16, 2), (40, 0), (64, 5), (130, 0)]  # windows and sinks


@torch.no_grad()
@pytest.mark.parametrize("value_dim", [D, D // 2])
@pytest.mark.parametrize(("window", "sinks"), RINGS)
@pytest.mark.parametrize("spec", [*FORMATS, "int4", "int2(first=0)", LONG])
def test_bytes_of_a_ring_are_those_predicted(spec, window, sinks, value_dim):
    format = Format.parse(spec).fit(D, value_dim)[0]
    name = f"sliding(window={window}, sinks={sinks})" if sinks else f"sliding(window={window})"
    state, draw = Packed(spec, format).new_state(backend(name)), torch.Generator().manual_seed(0)
    seen = set()
    for size in (1, 3, 29, 64, 1, 200, *[1] * 33, 90, 500):
        k, v = (torch.randn(2, HKV, size, dim, generator=draw) for dim in (D, value_dim))
        state.append(k, v)
        assert state.nbytes == state.predicted_bytes(state.seq_len, 2, HKV, D, 4, value_dim)
        seen.add(state.nbytes)
    # and it is full: more tokens take no more
    later, much_later = (
        max(state.predicted_bytes(n + i, 2, HKV, D, 4, value_dim) for i in range(256))
        for n in (2048, 2**20)
    )
    assert max(seen) <= later == much_later


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS[:3])
def test_padding_changes_nothing(pattern):
    """Whole groups of padding before a row: the same numbers as the row alone."""
    attn, draw = backend(pattern, impl="torch"), torch.Generator().manual_seed(1)
    both, alone = (state_of("int4(residual=8, group=32, first=2)", pattern) for _ in range(2))
    rotary, seen = ROPE if "sinks" in pattern else None, 0
    for size in (20, 90, 1, 1, 30, *[1] * 8):
        q, k, v = qkv(2, size, draw)
        seen += size
        mask = torch.arange(seen) >= torch.tensor([[0], [64]])
        k[1][:, ~mask[1, seen - size :]] = 1e3  # must not widen any range
        out = attn(q, k, v, state=both, padding_mask=mask, rotary=rotary)
        if own := min(size, seen - 64) if seen > 64 else 0:
            real = [x[1:, :, size - own :] for x in (q, k, v)]
            torch.testing.assert_close(
                out[1:, :, size - own :], attn(*real, state=alone, rotary=rotary)
            )
        else:
            assert not out[1].any()


@torch.no_grad()
def test_what_was_refused_changed_nothing(monkeypatch):
    attn, draw = backend("dense", impl="torch"), torch.Generator().manual_seed(0)
    state = state_of("int4(residual=0, group=32, first=0)")
    attn(*qkv(2, 70, draw), state=state)
    before, more = copy.deepcopy(state), qkv(2, 70, draw)
    with pytest.raises(
        ValueError,
        match=r"crop: got 10, but the tokens before number 64 .*valid are 0 and 64 to 70",
    ):
        state.crop(10)
    with pytest.raises(ValueError, match="the state holds"):
        attn(*qkv(3, 1, draw), state=state)
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        state.reorder(torch.tensor([0, 0, 1]))
    with pytest.raises(IndexError):
        state.select(torch.tensor([0, 5]))
    with pytest.raises(Unsupported, match="'reference', valid with a packed cache"):
        backend("dense", impl="reference")(*more, state=state)
    with pytest.raises(Unsupported, match="strided cannot read packed keys"):
        backend("strided(stride=4)")(*more, state=state)
    with torch.enable_grad(), pytest.raises(Unsupported, match="has no gradients"):
        attn(*(x.clone().requires_grad_() for x in more), state=state)
    calls, attention = [], packed.attention

    def fails(*args, **options):
        calls.append(1)
        return attention(*args, **options) if len(calls) < 2 else 1 / 0

    state.candidates = 20  # they come one by one, after the others have been packed
    monkeypatch.setattr(packed, "attention", fails)
    with pytest.raises(ZeroDivisionError):
        attn(*more, state=state)
    monkeypatch.undo()
    assert (state.seq_len, state.nbytes) == (before.seq_len, before.nbytes)
    torch.testing.assert_close(attn(*more, state=state), attn(*more, state=before))


@torch.no_grad()
def test_rotation_computes_the_same_and_spreads_outliers():
    attn, draw = backend("dense", impl="torch"), torch.Generator().manual_seed(0)
    q, k, v = qkv(1, 200, draw)
    k[..., 3] *= 30
    error = {}
    for more in ("", ", rotate='kv'"):
        spec = f"int4(residual=0, k_axis='token', group=32{more})"
        state, full = state_of(spec), attn.new_state()
        first, second = (
            [x[:, :, part] for x in (q, k, v)] for part in (slice(0, 150), slice(150, 200))
        )
        torch.testing.assert_close(
            attn(*first, state=state), attn(*first, state=full), rtol=1e-4, atol=1e-4
        )
        error[spec] = (attn(*second, state=state) - attn(*second, state=full)).norm()
    plain, rotated = error.values()
    assert rotated < 0.6 * plain
    with pytest.raises(Unsupported, match="valid is rotate='v'"):
        attn(*first, state=state_of("int4(rotate='k')"), rotary=ROPE)


@torch.no_grad()
def test_no_step_unpacks_the_cache():
    draw, attn = torch.Generator().manual_seed(0), backend("dense", impl="torch")
    state = PackedState(format_of("int4(residual=128)", 128))
    k, v = (torch.randn(1, 1, 20480, 128, generator=draw) for _ in "kv")
    state.append(k, v)  # without attention, which would take long
    for tokens in (1, 20):
        q, *new = (torch.randn(1, 2, tokens, 128, generator=draw)[:, :h] for h in (2, 1, 1))
        attn(q, *new, state=state)  # makes what the state holds known
        with PeakMemory("cpu") as peak:
            attn(q, *new, state=state)
        assert state.nbytes + peak.bytes < 0.5 * (k.nbytes + v.nbytes)


@torch.no_grad()
def test_the_default_int2_survives_attention_sinks():
    """A real model's first keys are long in few channels; packed, they take a group's levels."""
    draw, attn = torch.Generator().manual_seed(3), backend("dense")
    q, k, v = qkv(2, 300, draw)
    k[:, :, :4, :3] *= 40
    v[:, :, :4] *= 0.05  # and what they say hardly counts
    exact = attn(q[:, :, -8:], k, v)
    errors = {}
    for spec in ("int2", "int2(first=0)"):
        state = state_of(spec)
        attn(q[:, :, :-8], k[:, :, :-8], v[:, :, :-8], state=state)
        out = attn(q[:, :, -8:], k[:, :, -8:], v[:, :, -8:], state=state)
        errors[spec] = float((out - exact).square().mean())
    assert errors["int2"] < 0.7 * errors["int2(first=0)"]
