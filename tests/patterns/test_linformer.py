"""Linformer and its blockwise causal form: definitions, what is shared, padding, states, swaps and
the kernels.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import effattn
from effattn.conformance import inputs
from effattn.errors import Unsupported
from effattn.hf.state_layer import StateLayer
from effattn.interface import Shape
from effattn.kernels.linformer import project
from effattn.patterns.linformer import pooling
from effattn.states.full import ROLLBACK
from effattn.surgery.swapping import active, swap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "head": (2, 5, 24),
    "layer": (1, 5, 24),
    "kv": (1, 5, 24),
    "across": (1, 5, 24),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def trained(attn, *call, **options):
    """Run once, so that parameters exist, then moved to random values."""
    attn(*call, **options)
    with torch.no_grad():
        for n, parameter in enumerate(attn.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=n) * 0.5)
    return attn


# ---- bidirectional


@pytest.mark.parametrize("share", SHAPES)
@pytest.mark.parametrize("tokens", [1, 4, 5, 17, 24])
def test_definition(share, tokens):
    q, k, v = inputs(tokens, torch.float64)
    attn = trained(
        effattn.backend("linformer", k=5, max_length=24, share=share), q, k, v, causal=False
    ).double()
    E, F = attn.weights
    assert E.shape == F.shape == SHAPES[share]
    assert (E is F) == (share in ("kv", "across"))
    expected = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            e, f = (w[min(h // 2, len(w) - 1), :, :tokens] for w in (E, F))
            slots_k = torch.stack(
                [sum(e[i, p] * k[b, h // 2, p] for p in range(tokens)) for i in range(5)]
            )
            slots_v = torch.stack(
                [sum(f[i, p] * v[b, h // 2, p] for p in range(tokens)) for i in range(5)]
            )
            for i in range(tokens):
                weights = torch.softmax(slots_k @ q[b, h, i] / 4, dim=0)
                expected[b, h, i] = weights @ slots_v
    torch.testing.assert_close(attn(q, k, v, causal=False), expected)


def test_padding_is_left_out_before_the_projection():
    q, k, v = inputs(9)
    attn = trained(effattn.backend("linformer", k=5, max_length=24), q, k, v, causal=False)
    alone = attn(
        q[:1, :, 2:7],
        k[:1, :, 2:7],
        v[:1, :, 2:7],
        causal=False,
    )
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 2:7], mask[1] = True, True
    hidden = [torch.where(mask[:, None, :, None], x, torch.nan) for x in (k, v)]
    out = attn(q, *hidden, causal=False, padding_mask=mask)
    torch.testing.assert_close(out[:1, :, 2:7], alone)
    assert not out[2].any()
    assert not out[0, :, :2].any()


def test_pooling_starts_from_exact_attention_and_never_counts_empty_slots():
    assert torch.equal(pooling(4, 4), torch.eye(4))
    uneven = pooling(3, 8)
    assert torch.allclose(uneven.sum(1), torch.ones(3))
    assert torch.equal((uneven > 0).sum(0), torch.ones(8, dtype=torch.int64))
    q, k, v = inputs(13, torch.float64)
    for tokens in (1, 7, 13):  # 13 slots, of which `tokens` are fed
        some = [x[:, :, :tokens] for x in (q, k, v)]
        exact = effattn.backend("dense")(*some, causal=False)
        torch.testing.assert_close(
            effattn.backend("linformer", k=13, max_length=13)(*some, causal=False), exact
        )


def test_the_global_generator_is_left_alone():
    q, k, v = inputs(8)
    before = torch.get_rng_state()
    first, other = (
        effattn.backend(
            "linformer",
            k=3,
            max_length=8,
            init="gaussian",
            seed=s,
        )
        for s in (0, 1)
    )
    first(q, k, v, causal=False), other(q, k, v, causal=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.E, first.F)
    assert not torch.equal(first.E, other.E)
    again = effattn.backend("linformer", k=3, max_length=8, init="gaussian", kv_heads=2)
    assert torch.equal(again.E, first.E)


def test_cost():
    attn = effattn.backend("linformer", k=4, max_length=64)
    shape = Shape(2, 4, 2, 32, 32, 16, itemsize=2, causal=False)
    cost = attn.cost(shape)
    # half of the tokens feed half of the slots
    assert cost.flops == 2 * 2 * 2 * 4 * 32 * 32 + 2 * 2 * 4 * 32 * 2 * 32
    assert cost.read_bytes == shape.query_bytes + shape.kv_bytes + 2 * 2 * 4 * 32 * 4
    assert cost.state_bytes == 0
    near = sum(abs(i - j) <= 2 for i in range(32) for j in range(32))
    windowed = effattn.backend("linformer", k=4, max_length=64, window=5).cost(shape)
    assert windowed.flops - cost.flops == 2 * 2 * 4 * near * 32
    assert windowed.read_bytes == cost.read_bytes


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"k": 0}, "linformer: k: got 0"),
        ({"k": 9, "max_length": 8}, "k: got 9 slots for max_length=8 tokens; valid is 1 to 8"),
        ({"share": "heads"}, "share: got 'heads' \\(did you mean 'head'"),
        ({"window": 4}, "linformer: window: got 4, a bidirectional window is odd; valid is 3 or 5"),
        ({"window": 0}, "linformer: window: got 0"),
        ({"init": "pol"}, "init: got 'pol' \\(did you mean 'pool'"),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(ValueError, match=error):
        effattn.backend("linformer", **options)


def test_bad_calls():
    q, k, v = inputs(9)
    attn = effattn.backend("linformer", k=4, max_length=8)
    with pytest.raises(Unsupported, match=r"causal=True is not possible.*'linformer_blockwise'"):
        attn(q, k, v)
    with pytest.raises(Unsupported, match=r"cannot decode.*'linformer_blockwise'"):
        attn.new_state()
    with pytest.raises(ValueError, match=r"got 9 tokens, linformer\(max_length=8\)"):
        attn(q, k, v, causal=False)
    attn(
        q[:, :, 1:],
        k[:, :, 1:],
        v[:, :, 1:],
        causal=False,
    )
    with pytest.raises(ValueError, match="expected 2 heads, as many as E has, got 4"):
        attn(
            q[:, :, 1:],
            q[:, :, 1:],
            q[:, :, 1:],
            causal=False,
        )


# ---- blockwise


def state_after(attn, q, k, v, *sizes: int):
    state, at, outs = attn.new_state(), 0, []
    for size in sizes:
        outs.append(attn(*(x[:, :, at : at + size] for x in (q, k, v)), state=state))
        at += size
    return state, torch.cat(outs, dim=2)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 29])
@pytest.mark.parametrize(
    ("k", "slots"),
    [
        (1, 1),
        (16, 2),
        (20, 3),
        (32, 4),
    ],
)
def test_blockwise_definition(tokens, k, slots):
    q, keys, v = inputs(tokens, torch.float64)
    attn = trained(
        effattn.backend("linformer_blockwise", k=k, max_length=32, block=4), q, keys, v
    ).double()
    assert attn.E.shape == (2, slots, 4)
    expected = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(tokens):
                scores, values = [], []
                for n in range(i // 4):
                    at = slice(4 * n, 4 * n + 4)
                    for s in range(slots):
                        score = (attn.E[h // 2, s] @ keys[b, h // 2, at]) @ q[b, h, i] / 4
                        scores.append(score + math.log(4 / slots))
                        values.append(attn.F[h // 2, s] @ v[b, h // 2, at])
                for j in range(i // 4 * 4, i + 1):
                    scores.append(keys[b, h // 2, j] @ q[b, h, i] / 4)
                    values.append(v[b, h // 2, j])
                expected[b, h, i] = torch.softmax(torch.stack(scores), dim=0) @ torch.stack(values)
    torch.testing.assert_close(attn(q, keys, v), expected)


@pytest.mark.parametrize("back", [1, 5, ROLLBACK])
def test_crop_across_a_block_border(back):
    q, k, v = inputs(50, torch.float64)
    attn = trained(
        effattn.backend("linformer_blockwise", k=16, max_length=32, block=4), q, k, v
    ).double()
    state, _ = state_after(attn, q, k, v, 27, 1, 2, 3)
    state.crop(33 - back)
    assert state.seq_len == 33 - back
    got = attn(*(x[:, :, 33 - back :] for x in (q, k, v)), state=state)
    torch.testing.assert_close(got, attn(q, k, v)[:, :, 33 - back :])


def test_a_crop_too_far_is_refused_and_changes_nothing():
    q, k, v = inputs(40)
    state, _ = state_after(
        effattn.backend("linformer_blockwise", k=16, max_length=32, block=4), q, k, v, 40
    )
    held = state.nbytes
    with pytest.raises(ValueError, match=r"crop: got 20, .* valid are 0 and 24 to 40"):
        state.crop(20)
    assert (state.seq_len, state.nbytes) == (40, held)
    token = k[:, :, :1].nbytes + v[:, :, :1].nbytes
    # 2 slots for each of 10 blocks, and the newest tokens
    assert held == (20 + 4 + ROLLBACK) * token
    state.crop(0)
    assert (state.seq_len, state.nbytes) == (0, 0)


def test_rows_that_begin_at_different_tokens_finish_blocks_at_different_times():
    q, k, v = inputs(23, torch.float64)
    attn = trained(
        effattn.backend("linformer_blockwise", k=16, max_length=32, block=4), q, k, v
    ).double()
    mask = torch.ones(3, 23, dtype=torch.bool)
    mask[1, :3], mask[2, :13] = False, False
    state, at, outs = attn.new_state(), 0, []
    for size in (2, 9, 1, 1, 1, 4, 5):
        part = [x[:, :, at : at + size] for x in (q, k, v)]
        at += size
        outs.append(attn(*part, padding_mask=mask[:, :at], state=state))
    out = torch.cat(outs, dim=2)
    for row in range(3):
        alone = attn(*(x[row : row + 1, :, mask[row]] for x in (q, k, v)))
        torch.testing.assert_close(out[row : row + 1, :, mask[row]], alone)


def test_gradients_reach_the_projections_through_a_state():
    q, k, v = inputs(16, torch.float64)
    attn = trained(
        effattn.backend("linformer_blockwise", k=16, max_length=32, block=4), q, k, v
    ).double()
    found = []
    for sizes in ((16,), (7, 1, 8)):
        attn.zero_grad()
        state_after(attn, q, k, v, *sizes)[1].square().sum().backward()
        found.append([p.grad.clone() for p in attn.parameters()])
    torch.testing.assert_close(*found)


# ---- in models


def bert(share="head", k=64):
    from test_encoders import tiny

    return swap(tiny(), "linformer", k=k, max_length=64, share=share)


def test_bert_with_as_many_slots_as_tokens_is_dense():
    from test_encoders import batch, outputs, tiny

    torch.testing.assert_close(
        outputs(bert(), batch()), outputs(tiny(), batch()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("share", ["head", "across"])
def test_bert_is_saved_and_loaded(share, tmp_path):
    from safetensors.torch import load_file
    from test_encoders import batch, outputs

    model = bert(share, k=8)
    learned = {name: p for name, p in model.named_parameters() if "effattn" in name}
    assert len(learned) == (1 if share == "across" else 6)
    with torch.no_grad():
        for n, parameter in enumerate(learned.values()):
            parameter.copy_(draw(*parameter.shape, seed=n) * 0.2)
    expected = outputs(model, batch())
    effattn.save(model, tmp_path / "out")
    assert len(load_file(tmp_path / "out" / "effattn.safetensors")) == len(learned)
    loaded = effattn.load(tmp_path / "out")
    assert torch.equal(outputs(loaded, batch()), expected)
    assert len([name for name, _ in loaded.named_parameters() if "effattn" in name]) == len(learned)
    loaded(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in loaded.named_parameters() if "effattn" in name)


def test_a_causal_model_is_pointed_to_the_causal_form():
    from conftest import tiny

    model = tiny("llama")
    with pytest.raises(Unsupported, match="'linformer_blockwise'"):
        swap(model, "linformer")
    assert active(model) is None
    swap(model, "linformer_blockwise", k=16, max_length=32, block=4)
    assert active(model) is not None


@pytest.mark.parametrize("share", ["head", "across"])
def test_generation(share, tmp_path):
    from test_generation import WAYS, batch, generate, model_of, recomputed

    model = model_of("qwen3", f"linformer_blockwise(k=16, max_length=32, block=4, share={share!r})")
    data = batch()
    cache = effattn.new_cache(model)
    for way, options in WAYS.items():
        assert torch.equal(generate(model, data, **options), recomputed(model, data, **options)), (
            way
        )
    greedy = generate(model, data, past_key_values=cache)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert torch.equal(generate(model, data, prefill_chunk_size=3), greedy)
    one = {name: tensor[2:] for name, tensor in data.items()}
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=4), greedy[2:])
    effattn.save(model, tmp_path / "out")
    assert torch.equal(generate(effattn.load(tmp_path / "out"), data), greedy)


# ---- the projection


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_project(impl, dtype, heads, padded):
    """Against loops in fp64, gradients too; long enough for several splits of the positions."""
    tokens, slots, dim = (300, 20, 12) if impl == "triton" and heads == 1 else (50, 20, 12)
    x, w = (
        draw(2, 2, tokens, dim).to(DEVICE, dtype),
        draw(heads, slots, tokens + 3, seed=1).to(DEVICE) / 8,
    )
    start, mask = None, None
    if padded:
        start = torch.tensor([0, 7], device=DEVICE)
        mask = torch.arange(tokens, device=DEVICE) >= start[:, None]
        mask[0, -5:] = False
    grad = draw(2, 2, slots, dim, seed=2).to(DEVICE)

    def loops(x, w):
        out = []
        for b in range(2):
            first = int(start[b]) if padded else 0
            real = x[b, :, first:] * (mask[b, first:, None] if padded else 1)
            out.append(w[:, :, : tokens - first] @ real)
        return torch.stack(out)

    found = []
    for run, to in ((lambda x, w: project(x, w, start, mask, impl), dtype), (loops, torch.float64)):
        leaves = [
            x.to(to).requires_grad_(),
            w.double().to(torch.float64 if to == torch.float64 else torch.float32),
        ]
        leaves[1].requires_grad_()
        out = run(*leaves)
        found.append([out, *torch.autograd.grad((out.double() * grad.double()).sum(), leaves)])
    assert found[0][0].dtype == dtype
    for got, true in zip(*found, strict=True):
        error = (got.double() - true).norm() / true.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)
