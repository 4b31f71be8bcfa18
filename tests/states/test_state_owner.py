"""A state knows whose it is, what it began with and in which mode; a cache's operations are all or
nothing.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from transformers import DynamicCache

import effattn
from effattn.errors import Unsupported
from effattn.registry import backend, backends
from effattn.surgery.swapping import swap

SPECS = [
    "dense",
    "strided(stride=3)",
    "sliding(window=6)",
    "sliding(window=7)",
    "sliding(window=6, sinks=2)",
    "sliding(window=6, dilation=2)",
    "block(block=6)",
    "block(block=3, look_back=1)",
    "s2(block=6)",
    "longnet(segments=[6], dilations=[1])",
    "longnet(segments=[6], dilations=[2])",
    "fixed(stride=6)",
    "fixed(stride=6, summary=2)",
    "longformer(window=6, global_tokens=2)",
    "longformer(window=6, global_tokens=[0, 3])",
    "longformer(window=6, global_tokens=[0, 2])",
    "linear",
    "linear(feature_map='relu')",
    "linear(decay=0.9)",
    "performer(features=16)",
    "performer(features=16, seed=1)",
    "performer(features=16, kernel='relu')",
    "gated",
    "gated(decay=0.9)",
    "gated(delta=True)",
    "gated(delta=True, gate=None)",
    "hybrid(window=6)",
    "hybrid(window=6, sinks=1)",
    "hybrid(window=6, feature_map='elu')",
    "lsh(rounds=2, buckets=4, chunk=4)",
    "lsh(rounds=2, buckets=4, chunk=4, seed=1)",
    "topk(window=6, block=4, blocks=2)",
    "topk(window=6, block=4, blocks=3)",
    "topk(window=6, block=4, blocks=2, summary='minmax')",
    "vq(codes=8, block=5)",
    "vq(codes=4, block=5)",
    "linformer_blockwise(k=8, max_length=32, block=8)",
    "linformer_blockwise(k=8, max_length=32, block=4)",
]


def qkv(tokens=5, batch=2, heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    shapes = (
        (batch, heads, tokens, dim),
        (batch, kv_heads, tokens, dim),
        (batch, kv_heads, tokens, dim),
    )
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def test_every_option_that_a_state_depends_on_is_in_its_signature():
    assert len({backend(spec).signature for spec in SPECS}) == len(SPECS)
    assert {spec.split("(")[0] for spec in SPECS} | {"linformer"} == set(backends())
    assert all(backend(spec).signature == backend(spec, impl="torch").signature for spec in SPECS)


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True])
def test_a_state_of_another_backend_is_refused(filled):
    for giver, taker in zip(SPECS, SPECS[1:] + SPECS[:1], strict=True):
        one, other = backend(giver), backend(taker)
        state = one.new_state()
        if filled:
            one(*qkv(), state=state)
        with pytest.raises(ValueError, match="state: it belongs to"):
            other(*qkv(), state=state)
        one(*qkv(), state=state)
        assert state.seq_len == (10 if filled else 5)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_what_a_state_began_with_stays(spec):
    attn = backend(spec)
    state = attn.new_state()
    attn(*qkv(40), state=state)
    others = {"batch": 3, "kv_heads": 4, "dim": 16, "dtype": torch.float64}
    for name, value in others.items():
        if name == "dim" and ("performer" in spec or "lsh" in spec or "vq" in spec):
            continue  # the backend's own parameters do not fit either
        with pytest.raises(ValueError, match=r"the state holds|expected|codebook"):
            attn(*qkv(2, **{name: value}), state=state)
    assert state.seq_len == 40
    attn(*qkv(2), state=state)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
def test_rows_that_are_not_there(spec):
    attn = backend(spec)
    state = attn.new_state()
    attn(*qkv(40), state=state)
    before = [x.clone() for x in state.tensors()]
    for index in ([0, 2], [-1, 0]):
        with pytest.raises(IndexError, match="valid are 0 to 1"):
            state.select(torch.tensor(index))
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        state.reorder(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="valid is a whole number"):
        state.repeat(0)
    for n in (-1, 41):
        with pytest.raises(ValueError, match="valid is 0 to 40"):
            state.crop(n)
    assert all(map(torch.equal, before, state.tensors()))


@torch.no_grad()
def test_a_mask_that_says_otherwise_than_before():
    attn = backend("sliding(window=6, sinks=2)")
    state = attn.new_state()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False
    attn(*qkv(10), padding_mask=mask[:, :10], state=state)
    with pytest.raises(ValueError, match="padding_mask: got None"):
        attn(*qkv(1), state=state)
    with pytest.raises(ValueError, match="padding_mask: it says otherwise"):
        attn(*qkv(1), padding_mask=torch.ones(2, 11, dtype=torch.bool), state=state)
    attn(*qkv(1), padding_mask=mask[:, :11], state=state)
    mask[:, :] = True  # what the state remembers is its own
    with pytest.raises(ValueError, match="padding_mask: it says otherwise"):
        attn(*qkv(1), padding_mask=mask, state=state)


LEARNING = (
    "dense", "sliding(window=6)", "sliding(window=6, sinks=2)", "fixed(stride=6)",
    "longformer(window=6, global_tokens=2)",
    "linear(decay=0.9)", "performer(features=16)", "lsh(rounds=2, buckets=4, chunk=4)",
    "topk(window=6, block=4, blocks=2)", "linformer_blockwise(k=8, max_length=32, block=8)",
)  # fmt: skip


@pytest.mark.parametrize("spec", LEARNING)
def test_training_through_a_state(spec):
    """A prompt without gradients, then tokens with them: those of the whole, where the prompt is a
    constant.
    """
    attn = backend(spec, impl="torch").double()
    q, k, v = qkv(50, dtype=torch.float64)
    with torch.no_grad():
        attn(q, k, v)
    for asked in ("qkv", "q"):
        state, parts = attn.new_state(), []
        with torch.no_grad():
            attn(*(x[:, :, :40] for x in (q, k, v)), state=state)
        leaves = [
            x[:, :, 40:].clone().requires_grad_(name in asked)
            for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        for low, high in ((0, 1), (1, 2), (2, 10)):
            parts.append(attn(*(x[:, :, low:high] for x in leaves), state=state))
        whole = attn(
            *(
                torch.cat([x[:, :, :40], leaf], dim=2)
                for x, leaf in zip((q, k, v), leaves, strict=True)
            )
        )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        weights = torch.randn_like(whole[:, :, 40:])
        got = torch.autograd.grad((torch.cat(parts, dim=2) * weights).sum(), wanted)
        want = torch.autograd.grad((whole[:, :, 40:] * weights).sum(), wanted)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def model_and_tokens(**axes):
    model = tiny("llama", num_hidden_layers=3)
    swap(model, **axes)
    return model, torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(1))


MIXED = {"pattern": {"0": "dense", "1": "linear", "2": "sliding(window=5, sinks=2)"}}


@torch.no_grad()
@pytest.mark.parametrize("axes", [MIXED, {"cache": {"1-": "int8(residual=16, group=16)"}}])
@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.crop(-35),
        lambda cache: cache.crop(-51),
        lambda cache: cache.crop(3),
        lambda cache: cache.reorder_cache(torch.tensor([0, 1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([0, 2])),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 5])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        lambda cache: cache.batch_repeat_interleave(0),
    ],
)
def test_a_refused_operation_leaves_the_cache_as_it_was(axes, operation):
    model, tokens = model_and_tokens(**axes)
    for made in (effattn.new_cache(model), DynamicCache(config=model.config)):
        cache = made
        model(tokens[:, :50], past_key_values=cache)
        cache = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"valid|expected"):
            operation(cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [50] * 3
        got = model(tokens[:, 50:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(tokens[:, 50:], past_key_values=made).logits)


@torch.no_grad()
def test_a_layer_that_serves_two():
    model, tokens = model_and_tokens(pattern="sliding(window=5)")
    cache = effattn.new_cache(model)
    cache.layers[1] = cache.layers[0]
    with pytest.raises(Unsupported, match="each layer needs one of its own"):
        model(tokens, past_key_values=cache)


@pytest.mark.parametrize(
    "axes",
    [
        {"pattern": "sliding(window=8)"},
        {"pattern": "sliding(window=5, sinks=2)"},
        {"pattern": "linear(decay='retnet')"},
        {"pattern": "lsh(rounds=2, buckets=4, chunk=4)"},
        {"pattern": "topk(window=6, block=4, blocks=2)"},
        {"pattern": "fixed(stride=8)"},
        {"positions": "rerope(window=8)"},
        {"pattern": "sliding(window=24)", "cache": "int8(residual=16, group=16)"},
        {"cache": "int8(residual=0, group=16, first=3)"},
    ],
)
def test_in_and_out_of_inference_mode(axes):
    model, tokens = model_and_tokens(**axes)
    want = None
    for modes in (
        (torch.no_grad,) * 3,
        (torch.inference_mode, torch.no_grad, torch.inference_mode),
        (torch.no_grad, torch.inference_mode, torch.no_grad),
    ):
        cache, parts, at = effattn.new_cache(model), [], 0
        for mode, size in zip(modes, (40, 1, 3), strict=True):
            with mode():
                parts.append(model(tokens[:, at : at + size], past_key_values=cache).logits.clone())
                cache.reorder_cache(torch.tensor([0, 1]))
            at += size
        cache.crop(-2)
        got = torch.cat([part.detach() for part in parts], dim=1).tolist()
        want = got if want is None else want
        assert got == want
