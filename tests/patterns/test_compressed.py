"""Compressed memory (arXiv:1911.05507): what the window evicts stays as means, at their places in
the cache."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import tiny

import effattn
from effattn import positions
from effattn.conformance import inputs
from effattn.errors import Unsupported

SPEC = "sliding(window=6, sinks=2, compress=2, means=3)"
T, SIZE = 29, 8


def rule():
    return positions.rule("rope", length=64, head_dim=SIZE, heads=4)


def turned(x, places):
    """Half-split rotary embedding of x (..., n, SIZE) at places (n,)."""
    angle = places.double()[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def test_the_papers_formula():
    """softmax(q [sinks ; means ; window]^T) over the concatenation, whose places are positions. At
    token 28 the window begins at 24, its newest group of two has one token more to come."""
    q, k, v = inputs(T, torch.float64, sizes=(1, 1, 1, SIZE))
    found = effattn.backend(SPEC)(q, k, v, rotary=rule())
    for i, begins in ((28, 24), (27, 22), (13, 8), (9, 4), (5, 2), (3, 2)):
        groups = range(max(2, begins - 6), begins, 2)
        keys, values = (
            torch.stack(
                [x[0, 0, j] for j in range(2)]
                + [x[0, 0, g : g + 2].mean(0) for g in groups]
                + [x[0, 0, j] for j in range(begins, i + 1)]
            )
            for x in (k, v)
        )
        places = torch.arange(len(keys))
        scores = turned(keys, places) @ turned(q[0, 0, i : i + 1], places[-1:])[0] * SIZE**-0.5
        scores[2 : 2 + len(groups)] += math.log(2)
        torch.testing.assert_close(found[0, 0, i], scores.softmax(0) @ values)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("side", ["none", "left"])
def test_places_are_the_same_in_pieces(impl, side):
    tokens, dtype = (T, torch.float64) if impl == "torch" else (19, torch.float32)
    q, k, v = inputs(tokens, dtype, sizes=(2, 4, 2, SIZE))
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if side == "left":
        mask[1, :5] = False
    given = None if side == "none" else mask
    true = effattn.backend(SPEC, impl="reference")(q, k, v, rotary=rule(), padding_mask=given)
    attn = effattn.backend(SPEC, impl=impl)
    pieces = [[tokens], [1] * tokens, [18, 1]]
    for sizes in pieces if impl == "torch" else pieces[::2]:
        state, at = attn.new_state(), 0
        for size in sizes:
            some = [x[:, :, at : at + size] for x in (q, k, v)]
            at += size
            seen = None if given is None else given[:, :at]
            out = attn(*some, rotary=rule(), padding_mask=seen, state=state)
            real = mask[:, at - size : at]
            expected = true[:, :, at - size : at].transpose(1, 2)[real]
            close = 1e-6 if impl == "torch" else 1e-5
            torch.testing.assert_close(out.transpose(1, 2)[real], expected, rtol=close, atol=close)


def test_memory_is_bounded_and_rolls_back():
    attn = effattn.backend(SPEC)
    q, k, v = inputs(70, torch.float64, sizes=(1, 2, 2, SIZE))
    state = attn.new_state()
    whole = attn(q, k, v, rotary=rule())
    sizes = set()
    for at in range(70):
        attn(*(x[:, :, at : at + 1] for x in (q, k, v)), rotary=rule(), state=state)
        sizes.add(state.nbytes)
        if at == 50:
            state.crop(35)
            again = attn(*(x[:, :, 35:51] for x in (q, k, v)), rotary=rule(), state=state)
            torch.testing.assert_close(again, whole[:, :, 35:51])
    assert max(sizes) == (6 + 16 + 2 + 3 + 8) * 2 * SIZE * 2 * 8
    with pytest.raises(ValueError, match="crop: got 20, but tokens needed then were summed up"):
        state.crop(20)


def test_one_row_that_begins_late():
    """Its sinks come when the state lets go of padding already."""
    attn = effattn.backend(SPEC)
    q, k, v = inputs(70, torch.float64, sizes=(1, 2, 2, SIZE))
    mask = torch.arange(70)[None] >= 33
    own = [x[:, :, 33:] for x in (q, k, v)]
    whole = attn(*own, rotary=rule())
    state, found = attn.new_state(), []
    for low, high in [(0, 30), *((at, at + 1) for at in range(30, 50)), (50, 70)]:
        some = (x[:, :, low:high] for x in (q, k, v))
        found.append(attn(*some, rotary=rule(), padding_mask=mask[:, :high], state=state))
    torch.testing.assert_close(torch.cat(found, dim=2)[:, :, 33:], whole)


def test_gradients_of_places():
    q, k, v = (x.requires_grad_() for x in inputs(T, torch.float64, sizes=(2, 4, 2, SIZE)))
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :7] = False
    weights = torch.randn(2, 4, T, SIZE, dtype=torch.float64) * mask[:, None, :, None]
    grads = []
    for impl in ("reference", "torch"):
        out = effattn.backend(SPEC, impl=impl)(q, k, v, rotary=rule(), padding_mask=mask)
        grads.append(torch.autograd.grad((out * weights).sum(), (q, k, v)))
    for ours, true in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6)


def test_a_live_model(tokens, tmp_path):
    model = effattn.swap(tiny("llama", num_key_value_heads=2, dtype=torch.float32), SPEC)
    ids = tokens[:80].view(2, 40)
    whole = model(ids).logits
    cache = effattn.new_cache(model)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([21, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    written = model.generate(ids, max_new_tokens=3, num_beams=2, do_sample=False)
    assert written.shape == (2, 43)
    effattn.save(model, tmp_path / "saved")
    again = effattn.load(tmp_path / "saved")
    assert torch.equal(again(ids).logits, whole)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(ids).logits.isfinite().all()
    assert not torch.equal(effattn.restore(model)(ids).logits, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6, "compress": 4}, "window: got 6 with compress=4, valid is a multiple of it"),
        ({"window": 8, "compress": 4, "sinks": 2}, "sinks: got 2 with compress=4, .* such as 4"),
        ({"window": 8, "compress": 1}, "compress: got 1, valid is a whole number of at least 2"),
        ({"window": 8, "means": 3}, "means: got 3 without compress"),
        ({"window": 8, "compress": 4, "means": 0}, "means: got 0"),
        ({"window": [8, 4], "compress": 4}, "one window for all heads, and no dilation"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises((ValueError, Unsupported), match=message):
        effattn.backend("sliding", **options)


def test_what_does_not_go_with_it():
    q, k, v = inputs(9, torch.float32, sizes=(1, 2, 2, SIZE))
    with pytest.raises(Unsupported, match="causal"):
        effattn.backend(SPEC)(q, k, v, causal=False)
    for spec in ("alibi", "logn", "xpos", "rerope(window=4)", "dynamic_yarn", "rope+alibi"):
        rule = positions.rule(spec, length=16, head_dim=SIZE, heads=2)
        with pytest.raises(Unsupported, match=r"rotary: '"):
            effattn.backend(SPEC)(q, k, v, rotary=rule)
    model = tiny("llama")
    for axis in ({"cache": "int8"}, {"heads": "latent(rank=16)"}):
        with pytest.raises((Unsupported, ValueError), match=r"compress|ring, means"):
            effattn.swap(model, SPEC, calibration=torch.arange(96).repeat(12), **axis)(
                torch.arange(9)[None]
            )
