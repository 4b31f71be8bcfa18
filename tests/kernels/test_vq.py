"""Transformer-VQ: exact attention to quantized keys, its codebook, states, gradients, swaps and
kernels.
"""

from __future__ import annotations

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
from effattn.kernels import vq
from effattn.kmeans import kmeans
from effattn.states.full import ROLLBACK
from effattn.surgery.swapping import active, swap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def quantized(codebook: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Each key's nearest word, by the distances themselves."""
    found = torch.empty_like(k)
    for h, words in enumerate(codebook.to(k.dtype)):
        found[:, h] = words[torch.cdist(k[:, h], words).argmin(-1)]
    return found


def fitted(tokens: int = 61, codes: int = 12, **options):
    """q, k, v, and a backend calibrated to k, in fp64."""
    q, k, v = inputs(tokens, torch.float64)
    attn = effattn.backend("vq", codes=codes, block=8, **options)
    attn.calibrate(k.float())
    return q, k, v, attn


# ---- the definition


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 61])
def test_is_dense_attention_to_the_words(causal, tokens):
    q, k, v, attn = fitted()
    q, k, v = (x[:, :, :tokens] for x in (q, k, v))
    expected = effattn.backend("dense")(q, quantized(attn.codebook, k), v, causal=causal)
    torch.testing.assert_close(attn(q, k, v, causal=causal), expected)
    few = attn(q[:, :, -1:], k, v, causal=causal)  # queries are the last tokens
    torch.testing.assert_close(few, expected[:, :, -1:])


@pytest.mark.parametrize("block", [1, 3, 16, 100])
def test_the_block_changes_nothing(block):
    q, k, v, attn = fitted()
    other = effattn.backend("vq", codes=12, block=block)
    other(q, k, v)
    other.load_state_dict(attn.state_dict())
    torch.testing.assert_close(other(q, k, v), attn(q, k, v))


def test_gradients_of_queries_and_values_are_exact_and_keys_pass_straight_through():
    q, k, v, attn = fitted()
    attn.block = 64  # one block: every pair is direct
    found = []
    for run, key in ((attn, k), (effattn.backend("dense"), quantized(attn.codebook, k))):
        leaves = [x.clone().requires_grad_() for x in (q, key, v)]
        found.append(torch.autograd.grad((run(*leaves) * draw(*q.shape)).sum(), leaves))
    for ours, exact in zip(*found, strict=True):  # of k: what the word would get
        torch.testing.assert_close(ours, exact)


def test_keys_get_gradients_from_their_own_block_and_the_next():
    q, k, v, attn = fitted(tokens=32)  # blocks of 8
    for query, keys in (
        (5, range(6)),
        (15, range(16)),
        (31, range(16, 32)),
    ):
        leaf = k.clone().requires_grad_()
        (grad,) = torch.autograd.grad(attn(q, leaf, v)[:, :, query].square().sum(), leaf)
        reached = grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten().tolist()
        assert reached == list(keys)


# ---- the state


def after(attn, q, k, v, *sizes: int):
    state, at, outs = attn.new_state(), 0, []
    for size in sizes:
        outs.append(attn(*(x[:, :, at : at + size] for x in (q, k, v)), state=state))
        at += size
    return state, torch.cat(outs, dim=2)


def test_the_state_is_constant():
    q, k, v, attn = fitted(codes=12)
    state, _ = after(attn, q, k, v, 20)
    held = state.nbytes
    assert held == 3 * 2 * (12 * (4 + 16 * 8) + ROLLBACK * 2 * 16 * 8)
    for at in range(20, 61):
        attn(*(x[:, :, at : at + 1] for x in (q, k, v)), state=state)
        assert state.nbytes == held
    assert state.counts.sum() == 3 * 2 * (61 - ROLLBACK)


@pytest.mark.parametrize("sizes", [(61,), (1,) * 61, (30, 1, 1, 29), (17, 20, 24)])
def test_chunks(sizes):
    q, k, v, attn = fitted()
    torch.testing.assert_close(after(attn, q, k, v, *sizes)[1], attn(q, k, v))


@pytest.mark.parametrize("back", [1, 7, ROLLBACK])
def test_crop(back):
    q, k, v, attn = fitted()
    state, _ = after(attn, q, k, v, 40, 1, 1)
    state.crop(42 - back)
    state.reorder(torch.tensor([2, 0, 1]))
    got = attn(*(x[[2, 0, 1], :, 42 - back :] for x in (q, k, v)), state=state)
    torch.testing.assert_close(got, attn(q, k, v)[[2, 0, 1], :, 42 - back :])
    with pytest.raises(ValueError, match=r"crop: got 3, .* valid are 0 and 45 to 61"):
        state.crop(3)


# ---- the codebook


def test_calibration_finds_clusters():
    centres = draw(2, 6, 4) * 10
    rows = centres.repeat_interleave(50, 1) + 0.01 * draw(2, 300, 4)
    words, usage = kmeans(rows, 6, 5, torch.Generator().manual_seed(0))
    assert (torch.cdist(centres, words).amin(-1) < 0.1).all()
    assert torch.equal(usage, torch.full((2, 6), 50.0))


def test_calibration_makes_quantization_better_and_leaves_the_global_generator_alone():
    k = draw(2, 3, 400, 8)
    before = torch.get_rng_state()
    attn = effattn.backend("vq", codes=32)
    random = attn.commitment_loss(k)
    attn.calibrate(k)
    fit = attn.commitment_loss(k)
    assert fit < 0.8 * random
    again = effattn.backend("vq", codes=32)
    again.calibrate(k)
    assert torch.equal(again.codebook, attn.codebook)
    assert torch.equal(torch.get_rng_state(), before)
    mask = torch.ones(2, 400, dtype=torch.bool)
    mask[1, 100:] = False
    again.calibrate(torch.where(mask[:, None, :, None], k, torch.nan), padding_mask=mask)
    assert again.codebook.isfinite().all()
    assert again.usage.sum(-1).tolist() == [500.0] * 3


def test_only_codebooks_that_nobody_fitted_are_warned_of(tokens, tmp_path, recwarn):
    from conftest import tiny

    model = swap(tiny("llama"), "vq(codes=16)", calibration=tokens)
    swap(model, cache="full")  # the patterns stay as they are
    effattn.load(effattn.save(model, tmp_path / "saved"))
    assert not [str(one.message) for one in recwarn.list if "codebook" in str(one.message)]


def test_exact_with_a_word_for_every_key():
    q, k, v = inputs(20, torch.float64)
    attn = effattn.backend("vq", codes=60, block=8)
    attn.calibrate(k.float())
    torch.testing.assert_close(
        attn(q, k, v), effattn.backend("dense")(q, k, v), rtol=1e-5, atol=1e-5
    )


def test_updates_move_used_words_to_their_keys():
    k = draw(1, 2, 50, 4)
    attn = effattn.backend("vq", codes=4)
    attn.calibrate(k)
    words = attn.codebook.clone()
    target = words[:, :1].repeat(1, 20, 1)[None] + 0.01
    for _ in range(300):
        attn.update(target, decay=0.9)
    torch.testing.assert_close(attn.codebook[:, 0], target[0, :, 0])
    torch.testing.assert_close(attn.codebook[:, 1:], words[:, 1:])
    attn.update(target, decay=1.0)
    with pytest.raises(ValueError, match=r"decay: got 2"):
        attn.update(target, decay=2)


def test_the_commitment_loss_pulls_keys_to_their_words():
    k = draw(1, 2, 9, 4).requires_grad_()
    attn = effattn.backend("vq", codes=4)
    attn.commitment_loss(k).backward()
    torch.testing.assert_close(
        k.grad, (k - quantized(attn.codebook, k.detach())).detach() * 2 / k.numel()
    )


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: effattn.backend("vq", codes=0), "vq: codes: got 0"),
        (lambda: effattn.backend("vq", block=0), "vq: block: got 0"),
        (lambda: effattn.backend("vq", code=3), "did you mean 'codes'"),
        (
            lambda: effattn.backend("vq").calibrate(draw(1, 2, 9, 4)),
            "512 for 9 keys, the codebook is larger",
        ),
        (lambda: effattn.backend("vq").calibrate(draw(2, 9, 4)), "keys, padding_mask: expected"),
    ],
)
def test_bad_input(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_other_heads_than_the_codebooks_are_refused():
    q, _, _, attn = fitted()
    with pytest.raises(
        ValueError, match="expected 2 heads of size 16, as the codebook has, got 4 of size 16"
    ):
        attn(q, q, q)


def test_cost():
    attn = effattn.backend("vq", codes=8)
    shape = Shape(1, 4, 2, 1, 1000, 16, itemsize=2)
    cost = attn.cost(shape)
    assert cost.flops == 2 * 4 * 8 * 32 + 2 * 2 * 8 * 16
    assert cost.state_bytes == 2 * 8 * (4 + 4 * 16) + ROLLBACK * 2 * 32 * 2
    assert cost.state_bytes == attn.cost(Shape(1, 4, 2, 1, 100_000, 16, itemsize=2)).state_bytes


# ---- in models


def test_swap_calibrates_each_layer(tokens):
    from conftest import tiny

    model = tiny("llama")
    plain = model(tokens[None, :64]).logits
    swap(model, "vq", codes=16, block=16, calibration=tokens)
    attention = [layer.self_attn for layer in model.model.layers]
    books = [module.effattn_pattern.codebook for module in attention]
    assert not torch.equal(*books)
    close = (model(tokens[None, :64]).logits - plain).norm() / plain.norm()
    with pytest.warns(UserWarning, match="calibration: got none, so the codebooks of 2 layers"):
        swap(effattn.restore(model), "vq", codes=16, block=16)
    random = (model(tokens[None, :64]).logits - plain).norm() / plain.norm()
    assert close < 0.8 * random
    assert torch.equal(effattn.restore(model)(tokens[None, :64]).logits, plain)


def test_calibration_is_checked_before_anything_is_changed(tokens):
    from conftest import tiny

    model = tiny("llama")
    with pytest.raises(
        ValueError, match="512 codes, but 100 tokens in rows of 100: the codebook is larger"
    ):
        swap(model, "vq", calibration=tokens[:100])
    with pytest.raises(ValueError, match=r"calibration: got .* valid are tokens, int64"):
        swap(model, "vq", calibration=tokens.float())
    assert active(model) is None
    swap(model, "dense")
    with pytest.raises(Unsupported, match=r"swapped already; effattn.restore\(model\) first"):
        swap(model, "vq(codes=16)", calibration=tokens)
    assert active(model).specs == {0: "dense", 1: "dense"}


def test_generation(tokens, tmp_path):
    from conftest import tiny
    from test_generation import WAYS, batch, generate, recomputed

    model, data = (
        swap(tiny("qwen3", num_key_value_heads=2), "vq(codes=16, block=4)", calibration=tokens),
        batch(),
    )
    for way, options in WAYS.items():
        assert torch.equal(generate(model, data, **options), recomputed(model, data, **options)), (
            way
        )
    cache = effattn.new_cache(model)
    greedy = generate(model, data, past_key_values=cache)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert torch.equal(generate(model, data, prefill_chunk_size=3), greedy)
    one = {name: tensor[2:] for name, tensor in data.items()}
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=4), greedy[2:])
    assert torch.equal(generate(model, one, assistant_model=tiny("llama", seed=1)), greedy[2:])
    effattn.save(model, tmp_path / "out")
    loaded = effattn.load(tmp_path / "out")
    assert torch.equal(generate(loaded, data), greedy)
    book = model.model.layers[0].self_attn.effattn_pattern.codebook
    assert torch.equal(loaded.model.layers[0].self_attn.effattn_pattern.codebook, book)


def test_bert(tmp_path):
    from test_encoders import batch, outputs, tiny

    model = swap(
        tiny(),
        "vq",
        codes=8,
        block=4,
        calibration=torch.arange(3, 97).repeat(3),
    )
    expected = outputs(model, batch())
    effattn.save(model, tmp_path / "out")
    assert torch.equal(outputs(effattn.load(tmp_path / "out"), batch()), expected)


# ---- the kernels


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_is_the_same_in_every_precision(impl, dtype):
    k, words = draw(2, 2, 70, 12).to(DEVICE, dtype), draw(2, 19, 12, seed=1).to(DEVICE)
    expected = torch.cdist(k.double(), words.double()).argmin(-1)
    assert torch.equal(vq.nearest(k, words, impl), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("size", "first"),
    [
        (8, 0),
        (8, 5),
        (None, 3),
    ],
)
def test_summarise(impl, size, first):
    v = draw(2, 2, 21, 12).to(DEVICE).requires_grad_()
    codes = torch.randint(0, 20, (2, 2, 21), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    real = torch.arange(21, device=DEVICE) >= torch.tensor([[0], [6]], device=DEVICE)
    sums, counts = vq.summarise(
        v,
        codes,
        words=20,
        real=real,
        size=size,
        first=first,
        impl=impl,
    )
    expected, number = torch.zeros_like(sums), torch.zeros_like(counts)
    for b in range(2):
        for h in range(2):
            for t in range(21):
                block = 0 if size is None else (first + t) // size - first // size
                if real[b, t]:
                    expected[b, h, block, codes[b, h, t]] += v[b, h, t].detach()
                    number[b, h, block, codes[b, h, t]] += 1
    assert torch.equal(counts, number)
    torch.testing.assert_close(sums, expected)
    weights = draw(*sums.shape).to(DEVICE)
    (grad,) = torch.autograd.grad((sums * weights).sum(), v)
    for t in (0, 7, 20):
        block = 0 if size is None else (first + t) // size - first // size
        torch.testing.assert_close(grad[0, 1, t], weights[0, 1, block, codes[0, 1, t]])
    assert not grad[1, :, :6].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "first"), [(8, 5), (None, 3)])
def test_read(impl, dtype, size, first):
    """Against softmax over counted words in fp64, with gradients through the output and the
    log-sum-exp.
    """
    blocks = 1 if size is None else (first + 13) // size - first // size + 1
    q, words = (
        draw(2, 2, 14, 16).to(DEVICE, dtype),
        draw(1, 20, 16, seed=1).to(DEVICE, dtype).float(),
    )
    sums = draw(2, 1, blocks, 20, 12, seed=2).to(DEVICE)
    counts = (
        torch.randint(0, 3, (2, 1, blocks, 20), generator=torch.Generator().manual_seed(3))
        .int()
        .to(DEVICE)
    )
    counts[0, :, 0] = 0
    sums = sums * (counts[..., None] > 0)
    block = (
        torch.zeros(14, dtype=torch.int64)
        if size is None
        else (first + torch.arange(14)) // size - first // size
    )
    grads = draw(2, 2, 14, 12, seed=4).to(DEVICE), draw(2, 2, 14, seed=5).to(DEVICE)

    def definition(q, sums):
        n = counts[:, :, block].double()
        weights = torch.exp(0.3 * q @ words.double().mT) * n
        total = weights.sum(-1, keepdim=True)
        shares = (
            torch.exp(0.3 * q @ words.double().mT) / torch.where(total > 0, total, 1.0) * (n > 0)
        )
        return (shares[..., None, :] @ sums[:, :, block])[..., 0, :], total[..., 0].log()

    def run(q, sums):
        return vq.read(q, words, sums, counts, scale=0.3, size=size, first=first, impl=impl)

    found = []
    for function, to in (
        (run, (dtype, torch.float32)),
        (definition, (torch.float64, torch.float64)),
    ):
        leaves = [x.to(t).requires_grad_() for x, t in zip((q, sums), to, strict=True)]
        out, lse = function(*leaves)
        loss = (out.double() * grads[0]).sum() + (
            torch.where(lse.isfinite(), lse, 0.0) * grads[1]
        ).sum()
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    assert found[0][0].dtype == dtype
    blind = found[1][1] == -torch.inf
    assert blind.any()
    assert torch.equal(found[0][1] == -torch.inf, blind)
    for got, true in zip(*found, strict=True):
        got, true = (x.double().masked_fill(~x.isfinite(), 0.0) for x in (got, true))
        assert (got - true).norm() / true.norm() < (1e-5 if dtype == torch.float32 else 1e-2)
