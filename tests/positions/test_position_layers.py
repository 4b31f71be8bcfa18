"""Which layers a position rule goes to in models where some have a window of their own, and what is
saved of it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny
from test_position_swap import batch, close, config_of, logits
from transformers import AutoModelForCausalLM

import effattn
from effattn.hf import anatomy, positions
from effattn.positions.registry import parse, rules
from effattn.surgery.describing import describe
from effattn.surgery.swapping import restore, swap

GEMMA3 = {  # as Gemma 3 has it: a base of its own for each type of layer
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 16,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}
GEMMA2 = {name: value for name, value in GEMMA3.items() if name != "rope_parameters"}
OWN = ["rope(theta=10000.0)"] * 2
STRETCHES = {
    "pi(factor=4)": True,
    "ntk(factor=4)": True,
    "dynamic_ntk(factor=4)": True,
    "dynamic_pi": True,
    "dynamic_yarn": True,
    "yarn(factor=4)": True,
    "ntk_by_parts(factor=4)": True,
    "llama3(factor=4)": True,
    "longrope(factor=4, long_factor=[1, 2, 3, 4])": True,
    "abf(base=1e6)": True,
    "power(kappa=1)": True,
    "truncated": True,
    "rerope(window=8)": True,
    "leaky_rerope(window=8, k=4)": True,
    "logn": True,
    "rope+logn": True,
    "rope": False,
    "xpos": False,
    "nope": False,
    "alibi": False,
    "kerple": False,
    "sandwich": False,
    "t5": False,
}


def gemma3(**more):
    return tiny("gemma3_text", **{**GEMMA3, **more})


def test_every_rule_says_whether_it_stretches():
    assert {part.name for spec in STRETCHES for part in parse(spec)} == set(rules())


@pytest.mark.parametrize(("spec", "stretches"), STRETCHES.items())
@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2"])
def test_a_rule_that_stretches_goes_to_full_layers(kind, spec, stretches):
    more = {"gemma3_text": GEMMA3, "gemma2": GEMMA2}[kind]
    parts = anatomy.of(tiny(kind, **more))
    assert positions.reached(parts, parse(spec)) == ([2] if stretches else [0, 1, 2])


@pytest.mark.parametrize("kind", ["llama", "mistral", "cohere2"])
def test_where_all_layers_are_alike_it_goes_to_all_that_turn(kind):
    parts = anatomy.of(tiny(kind, **({"sliding_window": 16} if kind == "mistral" else {})))
    turning = [layer.index for layer in parts.layers if layer.rotary_dims]
    assert positions.reached(parts, parse("yarn(factor=4)")) == turning


@pytest.mark.parametrize("spec", ["yarn(factor=4)", "ntk(factor=4)", "pi(factor=4)"])
def test_gemma3_takes_it_in_the_parameters_of_its_full_layers(spec, tmp_path):
    model = gemma3()
    before, config = logits(model), config_of(model)
    swap(model, positions=spec)
    told = [layer["positions"] for layer in describe(model).layers]
    assert told == [*OWN, spec]
    kinds = model.config.rope_parameters
    assert kinds["sliding_attention"] == GEMMA3["rope_parameters"]["sliding_attention"]
    assert kinds["full_attention"] != GEMMA3["rope_parameters"]["full_attention"]
    if spec.startswith("yarn"):  # from the length and the base that its type was trained with
        assert kinds["full_attention"]["original_max_position_embeddings"] == 128
        assert kinds["full_attention"]["rope_theta"] == 1_000_000.0
    assert model.config.max_position_embeddings == 512
    swapped = logits(model)
    assert not torch.allclose(swapped, before, atol=1e-3)
    effattn.save(model, tmp_path / "out")
    assert "effattn" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64),
        effattn.load(tmp_path / "out"),
    ):
        assert torch.equal(logits(again), swapped)
        assert describe(again).layers[0]["positions"] == OWN[0]
    # by layers, in swapped attention, it is the same function
    restore(model)
    assert config_of(model) == config | {"architectures": ["Gemma3ForCausalLM"]}
    close(logits(swap(model, positions={"2": spec + "+logn"})), swapped)


@pytest.mark.parametrize("spec", ["yarn(factor=4)", "rerope(window=24)+logn"])
def test_gemma2_has_one_set_of_parameters_and_keeps_it(spec, tmp_path):
    model = tiny("gemma2", **GEMMA2)
    config = config_of(model)
    swap(model, positions=spec)
    assert model.config.rope_parameters == config["rope_parameters"]
    assert [layer["positions"] for layer in describe(model).layers] == [*OWN, spec]
    effattn.save(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["effattn"]
    assert saved == {"positions": {"2": spec}}
    whole = batch(padded=False)  # this class makes NaN of padding by itself
    assert torch.equal(logits(effattn.load(tmp_path / "out"), whole), logits(model, whole))


def test_dynamic_ntk_is_saved_in_both_terms_for_its_type(tmp_path):
    model = gemma3(max_position_embeddings=32)
    swap(model, positions="dynamic_ntk(factor=4)")
    long = batch(60, padded=False)
    effattn.save(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["effattn"]["positions"] == {"2": "dynamic_ntk(factor=4)"}
    assert saved["rope_parameters"]["sliding_attention"]["rope_type"] == "default"
    assert saved["rope_parameters"]["full_attention"]["rope_type"] == "dynamic"
    assert torch.equal(logits(effattn.load(tmp_path / "out"), long), logits(model, long))


def test_named_layers_override():
    model = gemma3()
    swap(model, positions={"0-": "yarn(factor=4)"})
    kinds = model.config.rope_parameters
    assert {one["rope_type"] for one in kinds.values()} == {"yarn"}
    assert kinds["sliding_attention"]["original_max_position_embeddings"] == 128
    everywhere = logits(model)
    # taken back in one type: what stands in the config is its own again
    swap(model, positions={"0-1": "rope"})
    assert [one["rope_type"] for one in model.config.rope_parameters.values()] == [
        "default",
        "yarn",
    ]
    partly = logits(model)
    assert not torch.allclose(partly, everywhere, atol=1e-3)
    assert torch.equal(logits(swap(restore(model), positions="yarn(factor=4)")), partly)


def test_each_type_has_its_own_trained_length(tmp_path):
    effattn.save(swap(gemma3(), positions="yarn(factor=4)"), tmp_path / "out")
    model = effattn.load(tmp_path / "out")
    plan = positions.make(anatomy.of(model), {"0-": "logn"})
    lengths = [plan.layers[index].rule.trained.length for index in range(3)]
    assert lengths == [128, 128, 512]  # full layers go that far with the rule that they have
