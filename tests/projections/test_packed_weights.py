"""Weights packed by bitsandbytes: calls, state_dict(), copies, pickles and files leave every bit of
them as it was.

Each test forces what a processor with AVX512-bf16 units does, on any processor.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import effattn

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

FOUR_BITS = {
    "nf4": dict(bnb_4bit_quant_type="nf4"),
    "fp4": dict(bnb_4bit_quant_type="fp4"),
    "nested": dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}


@pytest.fixture(autouse=True)
def wide_processor(monkeypatch):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny("llama", dtype=torch.float32, hidden_size=128, intermediate_size=128).save_pretrained(
        folder
    )
    return folder


def quantized(folder, kind: str):
    """As plain transformers loads it."""
    options = dict(load_in_8bit=True)
    if kind != "int8":
        options = dict(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            **FOUR_BITS[kind],
        )
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ).eval()


def linears(model) -> list:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def weights(model) -> list[torch.Tensor]:
    """What the packed weights stand for."""
    return [
        bnb.functional.dequantize_4bit(one.weight.data, one.weight.quant_state)
        for one in linears(model)
    ]


ENTRIES = {
    "swap": lambda model, tokens: effattn.swap(model, "dense"),
    "describe": lambda model, tokens: effattn.describe(model),
    "perplexity": lambda model, tokens: effattn.perplexity(model, tokens[:50], 32),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", [*FOUR_BITS, "int8"])
def test_calls_and_everything_that_asks_for_weights_change_no_bit(
    plain, kind, entry, tokens, tmp_path
):
    model, ids = quantized(plain, kind), tokens[None, :24]
    ENTRIES[entry](model, tokens)
    assert not any(one.support_avx512bf16_for_cpu for one in linears(model))
    before = logits(model, ids)
    model.state_dict()
    effattn.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "theirs")
    twins = {
        "the model": model,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "train and eval": copy.deepcopy(model).train().eval(),
        "to": torch.nn.Module.to(copy.deepcopy(model), "cpu"),
        "saved": effattn.load(tmp_path / "saved"),
        "saved by transformers": effattn.load(tmp_path / "theirs"),
    }
    for name, twin in twins.items():
        assert torch.equal(logits(twin, ids), before), name
    effattn.save(effattn.load(tmp_path / "saved"), tmp_path / "again")
    assert torch.equal(logits(effattn.load(tmp_path / "again"), ids), before)


@pytest.mark.parametrize("load", ["quantize", "load"])
def test_what_effattn_quantizes_is_never_rearranged(plain, load):
    if load == "load":
        model = effattn.quant.load_weights(plain, "nf4", "float32")
    else:
        model = effattn.quant.quantize_weights(AutoModelForCausalLM.from_pretrained(plain), "nf4")
    assert linears(model)
    assert not any(one.support_avx512bf16_for_cpu for one in linears(model))


@pytest.mark.parametrize("through", ["model", "state_dict", "file"])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_what_was_rearranged_before_is_turned_back(plain, kind, through, tmp_path):
    model = quantized(plain, kind)
    before = weights(model)
    for one in linears(model):  # what a call does
        one.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(
            one.weight.data, one.weight.quant_state
        )
    if through != "model":
        model.state_dict()  # scales are transposed now
    if through == "file":
        model.save_pretrained(tmp_path / "wrong")
        model = effattn.load(tmp_path / "wrong")
    effattn.save(model, tmp_path / "saved")
    for found in (weights(model), weights(effattn.load(tmp_path / "saved"))):
        for old, new in zip(before, found, strict=True):
            # bf16 scales; "nested" has them quantized to 8 bits again
            budget = 2**-8 if kind != "nested" or through == "model" else 2**-5
            torch.testing.assert_close(
                new,
                old,
                rtol=budget,
                atol=budget * float(old.abs().max()),
            )
            assert not torch.equal(old, torch.zeros_like(old))


@pytest.mark.parametrize("kind", [*FOUR_BITS, "int8"])
def test_second_projections_are_the_packed_ones(plain, kind, tokens, tmp_path):
    model, ids = quantized(plain, kind), tokens[None, :24]
    effattn.describe(model)
    own = logits(model, ids)
    # sees everything: the same function
    effattn.swap(model, "longformer(window=49, global_tokens=2)")
    at_first = logits(model, ids)
    torch.testing.assert_close(at_first, own, rtol=1e-4, atol=1e-4)
    assert not any(
        p.requires_grad for name, p in model.named_parameters() if "effattn_global" in name
    )
    assert torch.equal(logits(copy.deepcopy(model), ids), at_first)
    effattn.save(model, tmp_path / "saved")
    assert torch.equal(logits(effattn.load(tmp_path / "saved"), ids), at_first)
    assert not any(
        "effattn" in name for name in load_file(tmp_path / "saved" / "model.safetensors")
    )
    assert all("effattn" in name for name in load_file(tmp_path / "saved" / "effattn.safetensors"))
    restored = effattn.restore(model)
    assert torch.equal(logits(restored, ids), own)
    assert not any("effattn" in name for name in restored.state_dict())
