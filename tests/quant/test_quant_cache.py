"""`effattn.quant.cache`: a packed cache by itself, its rows and devices, and the static one that
compiles.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from transformers import DynamicCache

import effattn
from effattn.errors import Unsupported
from effattn.hf.state_layer import StateLayer
from effattn.quant.formats import Format
from effattn.quant.packed.static import StaticState
from effattn.registry import backend
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

IDS = torch.randint(3, 96, (2, 100), generator=torch.Generator().manual_seed(0))


def model_of(kind="llama", **changes):
    sizes = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    return tiny(kind, dtype=torch.float32, **sizes)


def generate(model, ids=IDS, **options):
    return model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **options)


@torch.no_grad()
def test_a_plain_model_with_a_packed_cache():
    model = model_of()
    plain, before = generate(model), model(IDS).logits
    cache = effattn.quant.cache(model, bits=8, group=32, residual=16)
    assert type(cache) is DynamicCache
    assert torch.equal(generate(model, past_key_values=cache), plain)
    assert [str(layer.cache) for layer in cache.layers] == ["int8(group=32, residual=16)"] * 2
    # the model's own caches are as before
    assert [row["cache"] for row in describe(model).layers] == ["full"] * 2
    assert torch.equal(generate(model), plain)
    swap(model, cache="int4")
    one = effattn.quant.cache(model, {"1": "int8"})
    generate(model, past_key_values=one)
    assert [None if layer.cache is None else layer.cache.spec for layer in one.layers] == [
        None,
        "int8",
    ]
    with pytest.raises(
        Unsupported, match=r"layer 0: pre_rope=True needs .*swap\(model, cache='int4"
    ):
        effattn.quant.cache(model, "int4", pre_rope=True)
    swap(model, "sliding(window=20)", cache="full")
    with pytest.raises(Unsupported, match="the cache was made for dense;"):
        model(IDS, past_key_values=one)
    assert torch.equal(restore(model)(IDS).logits, before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "got neither of spec and bits"),
        ({"spec": "int4", "bits": 4}, "got both"),
        ({"bits": 3}, "bits: got 3"),
        ({"bits": 4, "grup": 32}, "did you mean 'group'"),
        ({"spec": "int4(group=32)", "group": 64}, "group given twice"),
        ({"spec": {"0": "int4"}, "group": 64}, "beside a dict"),
        ({"spec": "full"}, "packs nothing"),
        ({"bits": 4, "max_length": 0}, "max_length: got 0"),
        ({"spec": {"1": "int4"}, "max_length": 9}, "layer 0 is not packed"),
        ({"spec": "int5"}, "got 'int5'"),
    ],
)
def test_mistakes_change_nothing(kwargs, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        effattn.quant.cache(model, **kwargs)
    assert active(model) is None


@torch.no_grad()
def test_rows_and_devices():
    model = model_of()
    cache = effattn.quant.cache(model, "int8(residual=16, group=32)")
    model(IDS[:, :70], past_key_values=cache)
    rows = IDS[[1, 0, 1]]
    whole = model(rows, use_cache=False).logits
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    step = model(rows[:, 70:90], past_key_values=cache).logits
    assert (step - whole[:, 70:90]).norm() / whole[:, 70:90].norm() < 0.02
    cache.batch_select_indices(torch.tensor([False, True, True]))
    step = model(rows[1:, 90:], past_key_values=cache).logits
    assert (step - whole[1:, 90:]).norm() / whole[1:, 90:].norm() < 0.02
    with pytest.raises(
        ValueError, match=r"the state holds .* only the number of tokens may differ"
    ):
        model(rows[:, :1], past_key_values=cache)
    cache.layers[0]._waiting = False
    assert {layer.get_seq_length() for layer in cache.layers} == {100}
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        model(rows, past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_a_static_cache_compiles_to_one_graph():
    torch._dynamo.reset()
    model, graphs, results = model_of("qwen3", num_hidden_layers=1), [], []
    run = torch._dynamo.lookup_backend("eager")

    def counted(graph, inputs):
        graphs.append(graph)
        return run(graph, inputs)

    spec = "int4(residual=8, group=32, first=2, rotate='kv')"
    for forward, room in (
        (model, None),
        (model, 100),
        (torch.compile(model, fullgraph=True, backend=counted), 100),
    ):
        cache = effattn.quant.cache(model, spec, max_length=room)
        model(IDS[:, :50], past_key_values=cache)
        model(IDS[:, 50:55], past_key_values=cache)
        steps = [forward(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(55, 80)]
        results.append(torch.cat(steps, dim=1))
        assert int(cache.get_seq_length()) == 80
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[1], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match=r"got 80 \+ 21 tokens, valid are at most max_length=100"):
        model(torch.cat([IDS, IDS], dim=1)[:, :21], past_key_values=cache)
    with pytest.raises(Unsupported, match=r"layer 0 .sliding.window=8.. forgets tokens"):
        effattn.quant.cache(swap(model_of(), "sliding(window=8)"), bits=4, max_length=64)


@torch.no_grad()
@pytest.mark.parametrize("swapped", [False, True])
def test_a_static_cache_within_the_models_own_window(swapped):
    """A window as long as the trained length (128) hides nothing from 64 tokens, and something from
    200.
    """
    plain = model_of("mistral", sliding_window=128)
    model = model_of("mistral", sliding_window=128)
    model = swap(model, "dense") if swapped else model
    cache = effattn.quant.cache(model, bits=8, max_length=64, group=32, residual=16)
    model(IDS[:, :40], past_key_values=cache)
    steps = [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(40, 64)]
    want = plain(IDS[:, :64]).logits[:, 40:]
    assert (torch.cat(steps, dim=1) - want).abs().max() < 0.02 * want.abs().max()
    with pytest.raises(Unsupported, match=r"layer 0 .sliding.window=128.. forgets tokens"):
        effattn.quant.cache(model, bits=8, max_length=200)


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 32])
def test_a_static_state_holds_what_a_growing_one_does(padded):
    from effattn.quant.packed.state import PackedState

    format, _ = Format.parse("int4(residual=40, group=32, first=3)").fit(32)
    attn, draw = backend("dense", impl="torch"), torch.Generator().manual_seed(0)
    static, growing, seen = StaticState(format, 260), PackedState(format), 0
    for size in (2, 60, *[1] * 70, 40, 1, 1):
        q, k, v = (torch.randn(2, heads, size, 32, generator=draw) for heads in (4, 2, 2))
        seen += size
        mask = torch.arange(seen) >= torch.tensor([[0], [padded]]) if padded else None
        a, b = (attn(q, k, v, state=state, padding_mask=mask) for state in (static, growing))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert static.nbytes == static.predicted_bytes(2, 2, 32, 4)
    static.crop(seen - 20)
    assert int(static.seq_len) == seen - 20
    with pytest.raises(
        ValueError, match=r"crop: got 50, but the tokens before are packed; valid are 0 and \d+ to"
    ):
        static.crop(50)
    assert type(StateLayer(0, "dense", static).state) is StaticState
    static.reorder(torch.tensor([1, 0]))
    static.repeat(2)
    static.select(torch.tensor([0, 3]))
    assert len(static.rest[0]) == 2


@torch.no_grad()
@pytest.mark.parametrize("length", [100, 99, 98, 90, 70])
def test_a_static_state_goes_on_from_where_it_was_cropped_to(length):
    """Also where the newest tokens' ring does not have the last packed group any more."""
    from effattn.quant.packed.state import PackedState

    format, _ = Format.parse("int4(residual=0, group=16)").fit(16)
    attn, draw = backend("dense", impl="torch"), torch.Generator().manual_seed(0)
    static, again = StaticState(format, 200), PackedState(format)
    given = [torch.randn(1, heads, 140, 16, generator=draw) for heads in (4, 2, 2)]

    def call(state, low: int, high: int):
        return attn(*(x[:, :, low:high] for x in given), state=state)

    call(static, 0, 40)
    for t in range(40, 132):
        call(static, t, t + 1)
    static.crop(length)
    call(again, 0, length)
    for t in range(length, length + 4):
        torch.testing.assert_close(
            call(static, t, t + 1), call(again, t, t + 1), rtol=1e-4, atol=1e-4
        )


def test_generating_with_a_static_cache():
    model = model_of()
    caches = [
        effattn.quant.cache(model, bits=8, group=32, residual=8, max_length=room)
        for room in (None, 128)
    ]
    assert torch.equal(*(generate(model, past_key_values=cache) for cache in caches))
