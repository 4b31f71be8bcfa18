"""Weights by bitsandbytes: what is replaced, how near it stays, every byte counted, and plain
checkpoints.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy
from effattn.hf.weights import is_packed, weight_bytes
from effattn.measuring.measurement import _model_facts
from effattn.profiling.cost import model_cost

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

NUMBERS = 802_816 * 4  # in the linears of the embedded model
# bits a number about, relative perplexity
KINDS = {"nf4": (4.5, 0.05), "int8": (8 + 32 / 256, 0.005)}


@pytest.fixture(scope="module")
def base():
    return effattn.embedded.load()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_packed_and_every_byte_is_counted(base, kind, tmp_path, monkeypatch):
    # else plain transformers computes in bf16
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    bits, error = KINDS[kind]
    model, text = copy.deepcopy(base), effattn.embedded.tokens("validation", 1025)
    assert effattn.quant.quantize_weights(model, kind) is model
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(map(is_packed, linears)) == len(linears) - 1, "all but the head"
    assert not is_packed(model.lm_head)
    rest = weight_bytes(base) - 4 * NUMBERS
    assert weight_bytes(model) - rest == pytest.approx(NUMBERS * bits / 8, rel=0.01)
    before, after = (effattn.perplexity(m, text, 512) for m in (base, model))
    assert after == pytest.approx(before, rel=error)
    assert after != before
    assert weight_bytes(model) - rest == pytest.approx(NUMBERS * bits / 8, rel=0.01), (
        "after a call, too"
    )

    told, was = effattn.describe(model), effattn.describe(base)
    assert told.parameters == was.parameters
    assert told.kv_bytes_per_token == was.kv_bytes_per_token, "keys and values are no codes"
    assert told.dtype == "float32"
    assert told.layers[0]["projections"] == f"dense, {kind}"
    cost, plain = (model_cost(m, 1, 1, past=64) for m in (model, base))
    assert cost.weight_bytes == weight_bytes(model)
    assert cost.total.flops == plain.total.flops
    assert plain.step_bytes - cost.step_bytes == weight_bytes(base) - weight_bytes(model)

    effattn.save(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # plain transformers
    loaded = effattn.quant.load_weights("embedded", kind, "float32")
    with torch.no_grad():
        logits = [
            one(text[None, :32]).logits
            for one in (model, again, effattn.load(tmp_path / "saved"), loaded)
        ]
    assert all(torch.equal(logits[0], one) for one in logits[1:])
    assert weight_bytes(loaded) == weight_bytes(again) == weight_bytes(model)


def test_weights_and_cache_are_counted_together(base):
    model = effattn.quant.quantize_weights(copy.deepcopy(base), "nf4")
    facts = _model_facts(anatomy.of(model), None)
    assert (facts["weight_bytes"], facts["parameters"]) == (weight_bytes(model), 4_000_000)
    assert facts["dtype"] == "float32"
    effattn.swap(model, cache="int4(residual=32)")
    cache, ids = effattn.new_cache(model), effattn.embedded.tokens("validation", 256)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cost = model_cost(model, 1, 256)
    assert cost.weight_bytes == weight_bytes(model)
    assert cost.kv_bytes == sum(layer.nbytes for layer in cache.layers)
    assert cost.kv_bytes < 0.5 * 256 * 8192


def exact_int8_products() -> bool:
    """Whether torch multiplies int8 as it should: with ONEDNN_MAX_CPU_ISA=AVX2 on a processor that
    has more, its kernel adds pairs of products in 16 bits, which is too few."""
    a, b = (
        torch.full((32, 128), 127, dtype=torch.int8),
        torch.full((128, 32), 127, dtype=torch.int8),
    )
    return bool((torch._int_mm(a, b) == 127 * 127 * 128).all())


@pytest.mark.skipif(
    not exact_int8_products(), reason="torch._int_mm is wrong under this ONEDNN_MAX_CPU_ISA"
)
def test_other_architectures_keep_their_biases():
    model = tiny("qwen2", dtype=torch.float32, hidden_size=128, intermediate_size=128)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = effattn.quant.quantize_weights(model, "int8")(ids).logits
    assert anatomy.of(model).layers[0].q.module.bias is not None
    assert (after - before).norm() < 0.05 * before.norm()


def test_what_cannot_be_done_is_refused_before_anything_changes(base, tmp_path):
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match="did you mean 'nf4'"):
        effattn.quant.quantize_weights(model, "nf5")
    effattn.swap(model, projections="monarch(blocks=16)")
    with pytest.raises(Unsupported, match="MonarchLinear is no plain linear"):
        effattn.quant.quantize_weights(model)
    assert not any(map(is_packed, model.modules()))
    with pytest.raises(Unsupported, match="stacks experts"):
        effattn.quant.quantize_weights(tiny("mixtral", dtype=torch.float32))
    packed = effattn.quant.quantize_weights(copy.deepcopy(base))
    with pytest.raises(Unsupported, match="quantized already"):
        effattn.quant.quantize_weights(packed)
    with pytest.raises(Unsupported, match="packed in 4 or 8 bits"):
        effattn.convert_gqa(packed, kv_heads=2, calibration=effattn.embedded.tokens("train", 8000))
    effattn.save(effattn.swap(copy.deepcopy(base), "sliding", window=8), tmp_path / "swapped")
    with pytest.raises(Unsupported, match="a swapped checkpoint"):
        effattn.quant.load_weights(tmp_path / "swapped")
