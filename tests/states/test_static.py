"""Static forms: what a growing state gives and refuses, step for step, in tensors that keep their
shapes and places, so that a decoding step is one graph."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.hf.cache import new_cache
from effattn.specs import parse_spec
from effattn.surgery.swapping import swap

LENGTH = 160
# a row for every backend that decodes; None: it has no static form, and says so
ROWS = {
    "dense": True,
    "block": "block(block=8, look_back=1)",
    "sliding": "sliding(window=20, sinks=3)",
    "longformer": None,
    "strided": "strided(stride=8)",
    "fixed": "fixed(stride=8, summary=2)",
    "longnet": "longnet(segments=[8, 32], dilations=[1, 4])",
    "s2": "s2(block=16)",
    "linformer": None,
    "linformer_blockwise": None,
    "lsh": None,
    "topk": "topk(window=9, sinks=2, block=4, blocks=3)",
    "hybrid": None,
    "vq": None,
    "linear": "linear(feature_map='softmax', decay=0.9)",
    "performer": "performer(features=32)",
    "gated": "gated(decay=0.9)",
}
MORE = (
    "sliding(window=8, dilation=3)",
    "sliding(window=9, sink_logits=True)",
    "sliding(window=200)",
    "linear",
    "linear(feature_map='hedgehog')",
    "linear(feature_map='identity', decay=0.01, normalize=False)",
    "performer(features=32, kernel='relu')",
    "gated(delta=True, gate='feature', decay=0.5)",
    "topk(window=3, block=7, blocks=2, summary='minmax')",
    "topk(window=200, block=170, blocks=2)",
)
SPECS = [name if spec is True else spec for name, spec in ROWS.items() if spec] + list(MORE)
NEEDS = {
    "longformer": {"window": 9, "global_tokens": 2},
    "linformer": {"k": 8, "max_length": 64},
    "linformer_blockwise": {"k": 8, "max_length": 64, "block": 8},
    "vq": {"codes": 8, "block": 8},
    "hybrid": {"window": 4},
    "lsh": {"rounds": 2, "buckets": 4, "chunk": 4},
}


def made(spec: str):
    name, options = parse_spec(spec)
    return effattn.backend(name, **options, impl="torch")


def new(tokens: int, draw: torch.Generator):
    shape = (tokens, 16)
    return [torch.randn(2, h, *shape, generator=draw, dtype=torch.float64) for h in (4, 2, 2)]


def refusals(state, past: int) -> list[str | None]:
    """What going back to every earlier length is answered with."""
    found = []
    for n in range(max(0, past - 50), past + 2):
        try:
            state.check_crop(n)
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found


def test_every_backend_has_a_row():
    assert set(ROWS) == set(effattn.backends())


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 12])
@pytest.mark.parametrize("spec", SPECS)
def test_step_for_step_the_same(spec, padded):
    attn, draw, past = made(spec), torch.Generator().manual_seed(0), 0
    states = attn.static_state(LENGTH), attn.new_state()
    kept = None
    for size in (5, 1, 20, *[1] * 30, -6, *[1] * 30, 9, 1, -2, 1):
        if size < 0:
            assert refusals(states[0], past) == refusals(states[1], past)
            past += size
            for state in states:
                state.crop(past)
            continue
        qkv = new(size, draw)
        past += size
        mask = torch.arange(past) >= torch.tensor([[0], [padded]]) if padded else None
        got, want = (attn(*qkv, state=state, padding_mask=mask) for state in states)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        where = [x.data_ptr() for x in states[0].everything() if x is not states[0].real]
        assert kept in (None, where), "a tensor has moved"
        kept = where
    assert int(states[0].seq_len) == past
    for state in states:
        state.reorder(torch.tensor([1, 0]))
        state.repeat(2)
        state.select(torch.tensor([3, 0]))
    qkv, real = new(1, draw), states[1].real
    mask = None if real is None else torch.cat([real, real.new_ones(2, 1)], dim=1)
    got, want = (attn(*qkv, state=state, padding_mask=mask) for state in states)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for state in states:
        state.reset()
    qkv = new(40, draw)
    got, want = (attn(*qkv, state=state) for state in states)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_what_is_refused():
    attn, draw = made("sliding(window=9, sinks=2)"), torch.Generator().manual_seed(0)
    state = attn.static_state(32)
    with pytest.raises(ValueError, match=r"got 0 \+ 33 tokens, valid are at most max_length=32"):
        attn(*new(33, draw), state=state)
    attn(*new(32, draw), state=state)
    with pytest.raises(ValueError, match=r"got 32 \+ 1 tokens, valid are at most max_length=32"):
        attn(*new(1, draw), state=state)
    with pytest.raises(Unsupported, match="a static one has no gradients"), torch.enable_grad():
        attn(*(x.requires_grad_() for x in new(1, draw)), state=attn.static_state(9))
    for spec in ("dense", "linear"):  # the interpreter's, here
        attn = effattn.backend(spec, impl="triton")
        with pytest.raises(Unsupported, match="impl: 'triton' takes lengths from the host"):
            attn(*(x.float() for x in new(1, draw)), state=attn.static_state(9))
    attn = made("dense")
    with pytest.raises(ValueError, match="max_length: got 0, valid is a whole number"):
        attn.static_state(0)
    for name, spec in ROWS.items():
        if spec is None:
            with pytest.raises(Unsupported, match=f"{name}.*(has no static form|cannot decode)"):
                effattn.backend(name, **NEEDS[name]).static_state(32)


SWAPS = {
    "dense": {"pattern": "dense"},
    "ring": {"pattern": "sliding(window=20, sinks=3)"},
    "sums": {"pattern": "linear(decay=0.9)"},
    "by layer": {"pattern": {"0": "dense", "1": "block(block=8)"}},
    "blocks": {"pattern": "topk(window=9, sinks=2, block=4, blocks=3)"},
    "rerope": {"positions": "rerope(window=24)"},
    "packed ring": {
        "pattern": "sliding(window=40, sinks=3)",
        "cache": "int4(group=16, residual=16)",
    },
    "packed": {"cache": "int8(group=16, residual=16, first=2)"},
}


USUAL = ("ring", "by layer", "sums", "blocks")  # the others take long


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [x if x in USUAL else pytest.param(x, marks=pytest.mark.slow) for x in SWAPS]
)
def test_a_step_of_a_model_is_one_graph(name):
    """256 steps, in which rings turn and sums grow: nothing is compiled anew."""
    torch._dynamo.reset()
    size = dict(num_hidden_layers=1 + (name == "by layer"), max_position_embeddings=512)
    model, graphs = swap(tiny("llama", **size), **SWAPS[name]), []
    ids = torch.randint(3, 96, (2, 270), generator=torch.Generator().manual_seed(0))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model, fullgraph=True, backend=backend)
    static, growing = new_cache(model, max_length=300), new_cache(model)
    for cache in (static, growing):
        model(ids[:, :14], past_key_values=cache)
    got = [step(ids[:, t : t + 1], past_key_values=static).logits for t in range(14, 270)]
    want = [model(ids[:, t : t + 1], past_key_values=growing).logits for t in range(14, 270)]
    atol = 2e-2 if "packed" in name else 1e-4
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1), rtol=1e-4, atol=atol)
    assert len(graphs) == 1
    assert int(static.get_seq_length()) == 270


def test_generate_takes_one():
    model = swap(tiny("llama"), "sliding(window=6, sinks=2)")
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    want = model.generate(ids, **options)
    got = model.generate(ids, past_key_values=new_cache(model, max_length=64), **options)
    assert torch.equal(got, want)
    part = swap(tiny("llama"), {"1": "dense"})
    with pytest.raises(Unsupported, match="max_length: layer 0 is not swapped"):
        new_cache(part, max_length=64)
