"""`effattn.shrink`: layers that one names oneself."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy

LENGTH = 128


@pytest.fixture(scope="module")
def model():
    return tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tokens):
    return tokens[:1000]


def test_layers_become_what_they_are_named(model, text, tmp_path):
    small = copy.deepcopy(model)
    given = {"latent": {0: 24}, "kv_heads": {"1": 2}, "ffn": {"0-": 48}}
    assert effattn.shrink(small, **given, calibration=text, length=LENGTH) is small
    assert effattn.describe(small).layers[0]["heads"] == "latent(rank=24)"
    assert small.model.layers[1].self_attn.k_proj.out_features == 2 * 8
    again = effattn.load(effattn.save(small, tmp_path / "out"))
    with torch.no_grad():
        ids = text[None, :40]
        assert torch.equal(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "shrink: nothing to do; give kv_heads"),
        ({"kv_heads": 3}, "kv_heads: layer 0: got 3, valid is 0 or a divisor of 8 below it"),
        ({"kv_heads": {"9": 2}}, "kv_heads: got layers '9', the model has layers 0 to 1"),
        ({"kv_heads": 0}, "kv_heads: layer 0: got 0, which this layer cannot have"),
        ({"ffn": 96}, "ffn: layer 0: got 96, valid is a whole number from 0 to 95"),
        ({"ffn": True}, "ffn: layer 0: got True"),
        ({"latent": 0}, "latent: layer 0: got 0, valid is a whole number from 1"),
        ({"ffn_weights": "nf5"}, "ffn_weights: layer 0: got 'nf5'.*nf4"),
        ({"ffn_weights": "nf4(x=1)"}, "takes no options"),
        ({"ffn_weights": "lowrank(ratio=2)"}, "ffn_weights: layer 0: .*ratio"),
        ({"ffn_weights": "monarch(blokcs=4)"}, "ffn_weights: layer 0: "),
        ({"ffn_weights": "bitmask(sparsity=2)"}, "ffn_weights: layer 0: .*got 2"),
        ({"ffn_weights": "bitmask"}, "got 'bitmask', valid is for example 'bitmask.sparsity=0.5"),
        ({"ffn_weights": "bitmask(sparsity=0.5, x=1)"}, "got 'bitmask.*x=1.*, valid is for"),
        ({"ffn_weights": "bitmask(sparsity=0)"}, "layer 0: got .*valid is a higher sparsity"),
        ({"ffn_weights": "lowrank(ratio=0.5, ffn=True)"}, "lowrank takes no ffn here"),
        ({"ffn_weights": 4}, "ffn_weights: layer 0: got 4, valid is a form"),
        ({"ffn": 48}, "calibration: got None"),
        ({"latent": 8, "kv_heads": 2}, "layer 0: got kv_heads=2, latent=8, which one layer"),
        ({"latent": {0: 8}, "ffn_weights": {1: "nf4"}}, "bitsandbytes packs models of plain"),
    ],
)
def test_what_cannot_be(model, given, said):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        effattn.shrink(model, **given)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_models_that_cannot_be(model, text):
    with pytest.raises(Unsupported, match="shrink: LlamaForCausalLM is swapped"):
        effattn.shrink(effattn.swap(copy.deepcopy(model), "sliding", window=8), ffn=48)
    with pytest.raises(Unsupported, match="cannot have latent keys"):
        effattn.shrink(tiny("phi3"), latent=8, calibration=text)


def test_weights_are_packed_alone(model):
    pytest.importorskip("bitsandbytes")
    small = effattn.shrink(copy.deepcopy(model), ffn_weights="int8")
    with torch.no_grad():
        assert small(torch.arange(8)[None]).logits.isfinite().all()


def test_a_low_rank_of_ones_own(model, text):
    weights = {0: "lowrank(rank=8)"}
    small = effattn.shrink(
        copy.deepcopy(model), ffn_weights=weights, calibration=text, length=LENGTH
    )
    assert small.model.layers[0].mlp.up_proj.rank == 8


@pytest.mark.parametrize("then", [{"kv_heads": {0: 2}}, {"kv_heads": {1: 0}, "ffn": {0: 48}}])
def test_what_is_uneven_is_shrunk_again(model, text, tmp_path, then):
    small = copy.deepcopy(model)
    for given in ({"kv_heads": {1: 2}, "ffn": {1: 48}}, then):
        effattn.shrink(small, **given, calibration=text, length=LENGTH)
    again = effattn.load(effattn.save(small, tmp_path / "out"))
    assert [one.kv_heads for one in anatomy.of(again)] == [
        one.kv_heads for one in anatomy.of(small)
    ]
    with torch.no_grad():
        ids = text[None, :40]
        assert torch.equal(again(ids).logits, small(ids).logits)
