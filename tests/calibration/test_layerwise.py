"""Walking a model layer by layer: a layer is run no further than asked, attention once, and what a
calibration computes is what the passes and moments that it cannot do without take, counted."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from torch.utils.flop_counter import FlopCounterMode

import effattn
from effattn.calibration.layerwise import LayerRunner, windows
from effattn.calibration.statistics import SecondMoment
from effattn.hf import anatomy as hf
from effattn.prune.unstructured import calibration

LENGTH = 32
KINDS = [
    "llama",
    "gemma2",
    "olmo2",
    "phi",
    "phi3",
    "gpt_neox",
    "opt",
    "cohere",
    "stablelm",
]

ADDED = ("llama", "phi3", "opt", "stablelm")


def runner_of(model, tokens):
    parts = hf.of(model)
    return parts, LayerRunner(parts, windows(tokens[: 4 * LENGTH], LENGTH, 3))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_that_is_kept_gives_the_same_layer(kind, tokens):
    parts, runner = runner_of(tiny(kind), tokens)
    calls = []
    for layer in parts:
        layer.v.module.register_forward_hook(lambda *_: calls.append(1))
    hidden = runner.embed()
    for layer in parts:
        whole = [output for _, output in runner.run(layer.index, hidden)]
        heads = list(runner.until(layer.index, hidden, layer.o.module))
        calls.clear()
        kept = [runner.call(layer.index, *pair) for pair in zip(hidden, heads, strict=True)]
        assert calls == [], "no projection of attention is computed again"
        for a, b in zip(whole, kept, strict=True):
            assert torch.equal(a, b)
        layer.o.module.weight.data.mul_(2)  # what follows the heads is computed, not remembered
        again = runner.call(layer.index, hidden[0], heads[0])
        assert torch.equal(again, runner.call(layer.index, hidden[0]))
        assert not torch.equal(again, whole[0])
        assert "forward" not in vars(layer.attention)
        hidden = whole


@torch.no_grad()
def test_attention_whose_output_is_changed_behind_its_projection_runs_again(tokens):
    parts, runner = runner_of(tiny("llama"), tokens)
    layer, hidden = parts.layers[0], runner.embed()
    layer.attention.register_forward_hook(lambda _, __, output: (2 * output[0], *output[1:]))
    whole = runner.call(0, hidden[0])
    heads = next(runner.until(0, hidden, layer.o.module))
    assert torch.equal(runner.call(0, hidden[0], heads), whole)


@torch.no_grad()
def test_a_module_stops_its_layer(tokens):
    parts, runner = runner_of(tiny("llama"), tokens)
    layer, hidden, calls = parts.layers[0], runner.embed(), []
    layer.feed_forward.output.register_forward_hook(lambda *_: calls.append(1))
    seen = list(runner.until(0, hidden, layer.o.module))
    assert [x.shape for x in seen] == [(3, LENGTH, 64), (1, LENGTH, 64)]
    assert calls == []
    runner.call(0, hidden[0])
    assert calls == [1]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
)
@pytest.mark.parametrize("ones", [False, True])
def test_moments_are_those_in_fp64(dtype, ones):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5000, n, generator=draw).mul(30).to(dtype) for n in (24, 40))
    a[:, 3] *= 500  # a massive channel drowns no other
    own, cross = SecondMoment(ones), SecondMoment()
    for rows in (slice(0, 1), slice(1, 1500), slice(1500, None)):
        own.add(a[rows])
        cross.add(a[rows], b[rows])
    x, y = a.double(), b.double()
    x1 = torch.cat([x, x.new_ones(len(x), 1)], 1) if ones else x
    size = x1.square().sum(0).sqrt()
    exact = dtype.itemsize > 2
    for found, expected, scale in (
        (own.sum, x1.T @ x1, size[:, None] * size),
        (cross.sum, x.T @ y, x.norm(dim=0)[:, None] * y.norm(dim=0)),
    ):
        assert found.dtype == torch.float64
        assert ((found - expected).abs() / scale).max() < (1e-14 if exact else 1e-6)


# ---- what it computes, counted
# -------------------------------------------------------------------------------------------------


def counted(work) -> int:
    def in_place(_, a, b, **kwargs) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: in_place}
    ) as counter:
        work()
    return counter.get_total_flops()


def model_of(**more):
    return tiny("llama", dtype=torch.float32, attn_implementation="eager", **more)


def forward(tokens, **more):
    """All layers once."""
    model = model_of(**more)
    return counted(lambda: model.model(tokens.view(-1, LENGTH), use_cache=False))


def moments(tokens, *sizes: tuple[int, int]) -> int:
    """Of the two layers, for every token."""
    return 2 * sum(2 * len(tokens) * a * b for a, b in sizes)


def converted(tokens):
    effattn.convert_gqa(
        model_of(),
        kv_heads=2,
        calibration=tokens,
        length=LENGTH,
    )


def pruned(tokens, method):
    effattn.prune.oneshot(
        model_of(),
        tokens,
        method=method,
        length=LENGTH,
    )


ALL_INPUTS = (
    (64, 64),  # of q, k and v
    (64, 64),  # of o
    (64, 64),  # of gate and up
    (96, 96),  # of down
)
ROWS = {
    # the old model and the new one; inputs with a 1, what o_proj gets, and that with its targets
    "convert_gqa": (
        converted,
        [8, 2],
        ((65, 65), (64, 64), (64, 64)),
        1.1,
    ),
    "sparsegpt": (
        lambda tokens: pruned(tokens, "sparsegpt"),
        [8],
        ALL_INPUTS,
        1.4,
    ),
    "wanda": (
        lambda tokens: pruned(tokens, "wanda"),
        [8],
        (),
        1.7,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_is_computed_for_a_token_is_near_the_least(name, tokens, monkeypatch):
    """The least: each layer once for every model that is walked through (by its key/value heads),
    and the moments. The difference of two lengths leaves out what is solved once, and the first
    batch, by which one-shot pruning tells a layer's error."""
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 256)
    work, models, sizes, most = ROWS[name]
    few, many = tokens[:768], tokens[:1792].clone()

    def least(some) -> int:
        passes = sum(forward(some, num_key_value_heads=heads) for heads in models)
        return passes + moments(some, *sizes)

    taken = counted(lambda: work(many)) - counted(lambda: work(few))
    ratio = taken / (least(many) - least(few))
    assert 1 <= ratio <= most, ratio


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_whether_attention_is_added_as_it_is(kind, tokens):
    """Not where a norm is in between (gemma2, olmo2), nor where the FFN stands beside it."""
    parts, runner = runner_of(tiny(kind), tokens)
    hidden = runner.embed()[0]
    for layer in parts:
        with runner.noticing(layer.index) as added:
            assert added == []
            for _ in range(2):  # the first run tells
                runner.call(layer.index, hidden)
        assert added == [kind in ADDED]
        ends = runner.ends_in(layer.index, hidden, layer.feed_forward.output)
        assert ends == (kind not in ("gemma2", "olmo2"))


@torch.no_grad()
def test_attention_that_is_scaled_is_not_added_as_it_is(tokens):
    parts, runner = runner_of(tiny("granite", residual_multiplier=0.5), tokens)
    states = runner.embed()[0]
    with runner.noticing(0) as added:
        runner.call(0, states)
    assert added == [False]
    assert not runner.ends_in(0, states, parts.layers[0].feed_forward.output)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ffn_beside_attention_is_added_as_it_is_in_every_dtype(dtype, tokens):
    """Where attention and the hidden states cancel, rounding is more than what is left of them."""
    parts, runner = runner_of(tiny("phi", dtype=dtype), tokens)
    for number, states in enumerate(runner.embed()):
        for layer in parts:
            assert runner.ends_in(layer.index, states, layer.feed_forward.output), number
            states = runner.call(layer.index, states)
