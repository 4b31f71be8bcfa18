"""Harm against its definition, in every precision."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny

import effattn
from effattn.fitting.building import Builder
from effattn.fitting.harm import Judge, divergence
from effattn.hf import anatomy
from effattn.measuring.variants import Variant, build
from effattn.quant.sensitivity.tokenwise import tokenwise

LENGTH = 128


@pytest.fixture(scope="module")
def model():
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tokens):
    return tokens[:1500]


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 30.0, 300.0])
def test_a_divergence_is_told_in_fp32(size):
    """Of logits that are nearly the same, and of some that have nothing to do with each other."""
    draw = torch.Generator().manual_seed(0)
    parent = 4 * torch.randn(64, 3000, generator=draw)
    student = parent + size * torch.randn(64, 3000, generator=draw)
    ours, theirs = (one.double().log_softmax(-1) for one in (student, parent))
    exact = (theirs.exp() * (theirs - ours)).sum(-1)
    found = divergence(student, parent)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=1e-15)
    assert found.double().mean().item() == pytest.approx(exact.mean().item(), rel=1e-3)
    assert not divergence(parent, parent.clone()).any()


def test_harm_is_the_kl_of_the_whole_model(model, text):
    other = tiny("llama", seed=1, dtype=torch.float32)
    found = Judge(model, text[:257], LENGTH).of(other)
    ids = text[:256].view(2, LENGTH)
    with torch.no_grad():
        ours, theirs = (one(ids).logits.double().log_softmax(-1) for one in (other, model))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    loss = -ours.flatten(0, 1).gather(1, text[1:257, None]).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-6)
    assert found["cross_entropy"] == pytest.approx(loss, rel=1e-6)
    assert Judge(model, text[:257], LENGTH).of(model)["kl"] == 0


def test_what_rounding_does_is_far_below_any_harm(model, text):
    judge = Judge(model, text[:257], LENGTH)
    assert 0 <= judge.rounding() < 1e-10
    assert Judge(tiny("llama", dtype=torch.bfloat16), text[:257], LENGTH).rounding() < 1e-10


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "opt"])
def test_harm_in_16_bits_is_that_of_the_change_alone(text, kind):
    """Rounding does more than an int8 cache: it is run in fp32, layer by layer, and left as it
    was."""
    half = tiny(kind, dtype=torch.bfloat16)
    whole = copy.deepcopy(half).float()
    before = {name: (x.data_ptr(), x.clone()) for name, x in half.named_parameters()}
    told = []
    for parent in (half, whole):
        swapped = effattn.swap(copy.deepcopy(parent), cache={"1": "int8(residual=8)"})
        told.append(Judge(parent, text[:257], 64).of(swapped))
    assert 0 < told[0]["kl"] < 1e-4
    assert told[0] == pytest.approx(told[1], rel=1e-3)
    for name, one in half.named_parameters():
        assert one.dtype == torch.bfloat16
        assert (one.data_ptr(), True) == (before[name][0], torch.equal(one, before[name][1]))


def test_harm_of_a_packed_cache_is_that_of_decoding(model, text):
    packed = build(model, Variant("x", {"cache": "int4(group=16, residual=0, first=0)"}))
    decoded = tokenwise(model, packed, text[:257], 64)["kl"]
    judge = Judge(model, text[:257], 64)
    assert judge.of(packed, piece=1)["kl"] == pytest.approx(decoded, rel=1e-3)
    assert judge.of(packed, piece=8)["kl"] == pytest.approx(decoded, rel=0.5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("gemma3_text", torch.float32), ("qwen3", torch.bfloat16)],
)
def test_harm_of_one_layer_is_the_same_from_that_layer_on(text, kind, dtype):
    """Layers before it are not run again, those behind it take whole windows."""
    parent = tiny(kind, dtype=dtype)
    builder, judge = Builder(anatomy.of(parent), text, length=64), Judge(parent, text[:257], 64)
    changes = [("cache", "int4(group=16, residual=8)"), ("window", 8), ("ffn_weights", "int8")]
    changes += [("kv_heads", 2), ("ffn", 48)]
    hidden, scored = builder.teacher.embed(), judge.layers.embed()
    for index in range(2):
        inputs = [states.clone() for states in hidden]
        seen = builder.see(index, hidden)
        for name, value in changes:
            student = builder.alone(index, name, value, seen, inputs)
            whole, alone = judge.of(student), judge.alone(student, index, scored)
            assert whole["kl"] > 0
            assert alone == pytest.approx(whole, rel=1e-4)
        scored = judge.layers.run(index, scored)
