"""Layers that differ: heads, FFN widths, and what is left out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import SMALL
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy, loading
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model

IDS = torch.arange(3, 23).view(2, 10)
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
HEADS = [2, 1, 0, 2]  # K/V heads that stay, with two query heads each
WIDTHS = [32, 48, 16, 0]
QUIET = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


def whole(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | SHAPE | settings)).double().eval()


def kept() -> Keep:
    return Keep(
        heads=[torch.arange(count) for count in HEADS],
        ffn=[torch.arange(width) for width in WIDTHS],
    )


def cut(model: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    return slice_model(model or whole(), kept(), uniform=False)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def test_what_is_cut_is_what_is_masked():
    model = whole()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, heads, width in zip(masked.model.layers, HEADS, WIDTHS, strict=True):
            layer.self_attn.o_proj.weight[:, heads * 2 * layer.self_attn.head_dim :] = 0
            layer.mlp.down_proj.weight[:, width:] = 0
    small = cut(model)
    # norms compute in fp32, whatever they are given
    assert torch.allclose(logits(small), logits(masked), atol=1e-6)
    assert [layer.kv_heads for layer in anatomy.of(small)] == HEADS
    assert [layer.heads for layer in anatomy.of(small)] == [2 * heads for heads in HEADS]
    # what is left out has no weights, nor has the norm before it
    names = small.state_dict().keys()
    assert not [name for name in names if "layers.2.self_attn" in name or "layers.2.input" in name]
    assert not [name for name in names if "layers.3.mlp" in name or "layers.3.post" in name]


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_what_transformers_has_settled_and_loads_both_ways(tied, tmp_path):
    small = cut(whole(tie_word_embeddings=tied))
    effattn.save(small, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "effattn" not in config
    assert config["per_layer_config"]["1"] == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
    }
    assert config["per_layer_config"]["2"]["skip"] == ["attention"]
    for load in (effattn.load, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "out")
        assert type(loaded) is LlamaForCausalLM
        assert torch.equal(logits(loaded), logits(small))
        assert loaded.config.per_layer_config[1].num_key_value_heads == 1
    effattn.save(loaded, tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        if file.name == "README.md":  # of which it says what it was made of
            continue
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "only",
    [
        {"ffn": kept().ffn},
        {"heads": kept().heads},
        {"ffn": [torch.arange(96)] * 3 + [torch.arange(0)]},
    ],
    ids=["ffn", "heads", "left out alone"],
)
def test_transformers_alone_refuses_until_it_builds_such_layers_itself(only, tmp_path):
    """Then it loads the same file; never as another model."""
    small = slice_model(whole(), Keep(**only), uniform=False)
    effattn.save(small, tmp_path / "out")
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    del config.quantization_config  # as where effattn is not installed
    try:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", config=config)
    except RuntimeError:
        return
    assert torch.equal(logits(loaded), logits(small))


def test_generation_and_caches():
    small = cut()
    expected = small.generate(IDS, use_cache=False, **QUIET)
    assert torch.equal(small.generate(IDS, **QUIET), expected)
    beams = small.generate(IDS, num_beams=3, **QUIET)
    assert torch.equal(beams, small.generate(IDS, num_beams=3, use_cache=False, **QUIET))
    assert torch.equal(small.generate(IDS[:1], prompt_lookup_num_tokens=3, **QUIET), expected[:1])
    padded = torch.cat([torch.zeros_like(IDS[:, :2]), IDS], dim=1)
    mask = (torch.arange(12) >= 2).expand(2, -1).long()
    found = small.generate(padded, attention_mask=mask, **QUIET)
    assert torch.equal(found[:, 2:], expected)


def test_the_attention_of_every_layer_follows_the_models():
    small = cut()
    expected = logits(small)
    for model in (small, copy.deepcopy(small)):
        model.set_attn_implementation("eager")
        told = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
        assert told == {"eager"}
        assert torch.allclose(logits(model), expected, atol=1e-6)


SWAPS = [
    {"pattern": "sliding(window=4, sinks=1)"},
    {"cache": "int8(group=16)"},
    {"positions": "rerope(window=4)"},
    {"projections": "lowrank(rank=4, method='svd')"},
]


@pytest.mark.parametrize("spec", SWAPS, ids=str)
def test_what_attends_can_be_swapped_and_saved(spec, tmp_path):
    small = cut().float()
    before = logits(small)
    effattn.swap(small, **spec)
    effattn.save(small, tmp_path / "out")
    for load in (effattn.load, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "out")
        assert torch.equal(logits(loaded), logits(small))
        assert effattn.describe(loaded).layers == effattn.describe(small).layers
    assert torch.equal(loaded.generate(IDS, **QUIET), small.generate(IDS, **QUIET))
    if "projections" not in spec:
        assert torch.equal(logits(effattn.restore(small)), before)


def test_what_is_told_of_a_layer_without_attention():
    layers = effattn.describe(cut()).layers
    assert [layer["heads"] for layer in layers] == [
        "gqa(kv_heads=2)",
        "mqa",
        "none",
        "gqa(kv_heads=2)",
    ]
    assert layers[2]["kv_bytes_per_token"] == 0
    assert layers[2]["parameters"]["attention"] == 0
    assert layers[3]["parameters"]["ffn"] == 0


def test_other_families():
    torch.manual_seed(0)
    settings = SMALL | SHAPE | {"head_dim": 16}
    model = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    small = slice_model(model, kept(), uniform=False)
    rebuilt = loading.from_state(type(small), small.config, small.state_dict(), torch.float32)
    assert torch.equal(logits(rebuilt), logits(small))
    assert small.model.layers[1].self_attn.q_norm.weight.shape == (16,)


def test_training_reaches_every_weight():
    small = cut().float().train()
    small(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"heads": [torch.arange(n) for n in (0, 1, 1, 1)]}, "first layer keeps its attention"),
        ({"ffn": [torch.arange(n) for n in (1, 2, 3)]}, "valid is one for each of 4"),
        ({"ffn": [torch.arange(1, 200)] * 4}, "valid are 0 to"),
    ],
)
def test_bad_shapes_are_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        slice_model(whole(), Keep(**keep), uniform=False)


def test_families_that_cannot_have_them_are_refused_by_name():
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**SMALL | SHAPE | {"pad_token_id": 0}))
    with pytest.raises(Unsupported, match="Phi3Config cannot have layers that differ"):
        slice_model(model, Keep(ffn=[torch.arange(n) for n in (1, 2, 3, 4)]), uniform=False)


def test_a_config_that_no_model_can_be_made_of(tmp_path):
    effattn.save(cut(), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["per_layer_config"]["9"] = {"intermediate_size": 3}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="per_layer_config"):
        effattn.load(tmp_path / "out")


def test_latents_are_for_layers_that_attend():
    with pytest.raises(Unsupported, match="layers 2 have no attention"):
        effattn.convert_latent(cut().float(), torch.arange(90).repeat(20), ratio=0.5)


def test_fewer_kv_heads_are_for_layers_that_are_alike():
    with pytest.raises(Unsupported, match="its layers differ in theirs"):
        effattn.convert_gqa(cut().float(), kv_heads=1, calibration=torch.arange(90).repeat(20))
