"""Positions of live models: plain where transformers can express them, owned layer by layer
elsewhere, and undone.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
from conftest import tiny
from torch import nn
from transformers import AutoModelForCausalLM

import effattn
from effattn.errors import Unsupported
from effattn.hf import hooks, live, positions
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap

PARTIAL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
MODELS = {  # what is special about their positions
    "llama": {},
    "gpt_neox": {"num_key_value_heads": 8},
    "gemma3_text": {},  # frequencies of their own for each type of layer
    "glm": PARTIAL,  # interleaved, partial
    "cohere2": {},  # interleaved, and a layer without
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": PARTIAL,
    "phi3": {"sliding_window": 9},
}


def batch(length=40, padded=True):
    tokens = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, : 7 if padded else 0] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs=None, **more):
    inputs = inputs or batch()
    return model(**inputs, **more).logits[inputs["attention_mask"].bool()]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # transformers' cos and sin are float32


def config_of(model):
    return copy.deepcopy(model.config.to_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model(kind):
    model = tiny(kind, **MODELS[kind])
    before, config, keys = logits(model), config_of(model), list(model.state_dict())
    swap(model, positions="rerope(window=64)")  # raw keys all the way; no pair is that far
    close(logits(model), before)
    swap(model, positions="rerope(window=4)")
    assert not torch.allclose(logits(model), before, atol=1e-3)
    # layer by layer: log-n begins beyond the trained length only
    swap(model, positions="yarn(factor=4)+logn")
    layered = logits(model)
    swap(model, positions="yarn(factor=4)")  # in the config
    # that of Phi-3 takes LongRoPE alone
    assert model.config.max_position_embeddings == (128 if kind == "phi3" else 512)
    close(logits(model), layered)
    assert not torch.allclose(layered, before, atol=1e-3)
    restore(model)
    assert torch.equal(logits(model), before)
    assert config_of(model) == config
    assert list(model.state_dict()) == keys
    assert not any(
        "effattn" in name
        for module in model.modules()
        for name in (*vars(module), *module._modules)
    )


PLAIN = [
    "pi(factor=4)",
    "ntk(factor=4)",
    "yarn(length=1024)",
    "abf(base=5e5, length=256)",
    "llama3(factor=8)",
    "ntk_by_parts(factor=4)",
]


@pytest.mark.parametrize("spec", PLAIN)
def test_what_transformers_can_express_needs_no_effattn(spec, tmp_path):
    model = tiny("llama")
    before = logits(model)
    swap(model, positions=spec)
    assert active(model) is None  # attention is as it was
    assert describe(model).layers[1]["positions"].startswith(spec.partition("(")[0])
    effattn.save(model, tmp_path / "out")
    assert "effattn" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert (
        again.config.max_position_embeddings
        == {"p": 512, "n": 512, "y": 1024, "a": 256, "l": 1024}[spec[0]]
    )
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), before, atol=1e-3)


def test_frequencies_per_type_of_layer_are_plain_too(tmp_path):
    model = tiny("gemma3_text")
    rules = {0: "ntk(factor=2)", 1: "yarn(factor=4)"}
    swap(model, positions=rules)
    kinds = model.config.rope_parameters
    assert {name: one["rope_type"] for name, one in kinds.items()} == {
        "sliding_attention": "default",
        "full_attention": "yarn",
    }
    effattn.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))
    swapped = logits(model)
    restore(model)
    swap(model, positions={0: rules[0] + "+logn", 1: rules[1]})
    close(logits(model), swapped)


LAYERED = [
    "ntk(factor=2, variant='mixed')",
    "leaky_rerope(window=8, k=4)+logn",
    "nope",
    "kerple",
    "rope+t5",
]


@pytest.mark.parametrize("spec", LAYERED)
def test_the_rest_is_applied_again_by_load(spec, tmp_path):
    model = tiny("qwen3")
    swap(model, positions={"1": spec})
    if learned := [p for name, p in model.named_parameters() if hooks.POSITIONS in name]:
        nn.init.uniform_(learned[0], 0.2, 1)
    assert [layer["positions"] for layer in describe(model).layers] == ["rope(theta=10000.0)", spec]
    effattn.save(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["effattn"]
    assert saved == {"positions": {"1": spec}}
    again = effattn.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert positions.active(again).specs == {1: spec}


@torch.no_grad()
@pytest.mark.parametrize("spec", ["pi(factor=2)", "yarn(factor=2)", "dynamic_ntk(factor=2)"])
def test_a_rule_that_the_class_would_not_read_back_is_ours(spec, tmp_path):
    """Phi-3's config refuses every rule but LongRoPE, and takes YaRN for it."""
    model, ids = tiny("phi3"), torch.arange(1, 90)[None]
    plain = model(ids).logits
    logits = effattn.swap(model, positions=spec)(ids).logits
    effattn.save(model, tmp_path / "x")
    assert torch.equal(effattn.load(tmp_path / "x")(ids).logits, logits)
    assert torch.equal(effattn.restore(model)(ids).logits, plain)


@pytest.mark.parametrize(
    "spec", ["dynamic_ntk(factor=4)", "longrope(factor=4, long_factor=[1, 2, 3, 4])"]
)
def test_rules_that_vary_are_saved_in_both_terms(spec, tmp_path):
    model = tiny("llama", max_position_embeddings=32)
    plain = logits(model, batch(32, padded=False))
    swap(model, positions=spec)
    long = batch(60, padded=False)
    effattn.save(model, tmp_path / "out")
    # as transformers reads it without effattn
    shutil.copytree(tmp_path / "out", tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    said = json.loads(file.read_text())
    for name in ("effattn", "quantization_config"):
        del said[name]
    file.write_text(json.dumps(said))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64)
    assert theirs.config.rope_parameters["rope_type"] == spec.partition("_")[0].partition("(")[0]
    torch.testing.assert_close(
        logits(theirs, long, use_cache=False), logits(model, long), rtol=1e-4, atol=1e-4
    )
    again = effattn.load(tmp_path / "out")
    assert torch.equal(logits(again, long), logits(model, long))
    assert torch.equal(logits(restore(again), batch(32, padded=False)), plain)
    effattn.save(swap(again, positions=spec), tmp_path / "twice")
    one, two = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "twice")
    )
    assert one == two


def test_positions_and_patterns_are_two_axes():
    model = tiny("llama")
    before = logits(model)
    swap(model, "sliding(window=12)", positions="rerope(window=5)")
    both = logits(model)
    restore(model)
    swap(model, positions={"0-1": "rerope(window=5)"})
    assert describe(model).layers[0]["pattern"] == "dense"
    swap(model, "sliding(window=12)")  # the rule stays
    assert torch.equal(logits(model), both)
    backend = model.model.layers[0].self_attn._effattn.backend
    # the pattern stays, with what it has learned
    swap(model, positions={"0": "rope", "1": "alibi"})
    assert model.model.layers[0].self_attn._effattn.backend is backend
    assert [layer["positions"] for layer in describe(model).layers] == [
        "rope(theta=10000.0)",
        "alibi",
    ]
    assert {layer["pattern"] for layer in describe(model).layers} == {"sliding(window=12)"}
    swap(model, "dense", positions="rope")
    close(logits(model), before)
    swap(model, "sliding(window=9, sinks=2)", positions="pi(factor=2)")
    assert model.config.rope_parameters["rope_type"] == "linear"  # sinks read the new frequencies
    plain = logits(model)
    swap(model, positions={"0-1": "pi(factor=2)+logn"})
    close(logits(model), plain)
    assert torch.equal(logits(restore(model)), before)


def test_a_failed_second_swap_leaves_the_first():
    model = swap(tiny("llama"), positions={"0": "rerope(window=5)", "1": "t5"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if hooks.POSITIONS in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    before, learned = logits(model), model.model.layers[1].self_attn.effattn_positions.learned
    for pattern, spec in (("lsh", {"0": "logn"}), (None, {"0": "alibi", "1": "pi(factor=0)"})):
        with pytest.raises(ValueError, match=r"exact pattern|pi: factor"):
            swap(model, pattern, positions=spec)
        assert torch.equal(logits(model), before)
    swap(model, positions={"0": "alibi"})
    assert model.model.layers[1].self_attn.effattn_positions.learned is learned
    swap(model, positions={"0": "rerope(window=5)"})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("spec", ["yarn(factor=4)", "kerple+rope"])
def test_copies_and_pickles_keep_the_positions(spec):
    model = tiny("llama")
    before = logits(model)
    swap(model, positions=spec)
    after, twin = logits(model), copy.deepcopy(model)
    restore(model)
    for copied in (twin, pickle.loads(pickle.dumps(twin))):
        assert torch.equal(logits(copied), after)
        assert torch.equal(logits(restore(copied)), before)
    assert torch.equal(logits(model), before)


def test_learned_positions_stay_and_biases_are_added():
    model = tiny("opt", ffn_dim=96, word_embed_proj_dim=64)
    before = logits(model)
    swap(model, positions="alibi")
    assert describe(model).layers[0]["positions"] == "learned+alibi"
    assert not torch.allclose(logits(model), before, atol=1e-3)
    swap(model, positions="logn")
    close(logits(model), before)
    assert torch.equal(logits(restore(model)), before)


def test_training_through_a_rule():
    model = tiny("llama", dtype=torch.float32)
    swap(model, positions="rerope(window=8)").train()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    ours = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    assert ours.abs().max() > 0
    swap(model, positions="t5")
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(
        p.grad.abs().max() > 0 for name, p in model.named_parameters() if hooks.POSITIONS in name
    )


MISTAKES = [
    ("llama", "rrope", ValueError, "did you mean"),
    ("llama", {"0": "rope", "0-1": "alibi"}, ValueError, "positions: layer 0 is in both"),
    ("llama", "pi(factor=0.5)", ValueError, "pi: factor: got 0.5"),
    (
        "llama",
        "yarn(length=64)",
        ValueError,
        "layer 0: yarn: length: got 64, shorter than the 128 tokens",
    ),
    ("llama", {"1": "leaky_rerope(window=4, k=0)"}, ValueError, "leaky_rerope: k: got 0"),
    (
        "opt",
        "rerope(window=8)",
        Unsupported,
        "layer 0: positions: 'rerope' clips .* no rotary positions",
    ),
    (
        "opt",
        "pi(factor=2)",
        Unsupported,
        "'pi' turns queries and keys, and these layers have no rotary",
    ),
    ("opt", "nope", Unsupported, "'nope' leaves out rotary positions"),
    ("smollm3", {"1": "pi(factor=2)"}, Unsupported, "layer 1: positions: 'pi' turns"),
]


@pytest.mark.parametrize(("kind", "spec", "error", "message"), MISTAKES)
def test_mistakes_change_nothing(kind, spec, error, message):
    opt = {"ffn_dim": 96, "word_embed_proj_dim": 64}
    model = tiny(kind, **({"opt": opt, "smollm3": {"no_rope_layers": [1, 0]}}.get(kind, {})))
    before, config = logits(model), config_of(model)
    with pytest.raises(error, match=message):
        swap(model, positions=spec)
    assert positions.active(model) is None
    assert active(model) is None
    assert config_of(model) == config
    assert torch.equal(logits(model), before)


def test_what_cannot_be_combined_is_refused_by_name():
    model = tiny("llama")
    for pattern, spec, message in (
        ("lsh", "rerope(window=8)", "'rerope.window=8.' need an exact pattern, which lsh is not"),
        ("lsh", "logn", "positions 'logn' need an exact pattern"),
        ("longformer(window=5, global_tokens=2)", "logn", "second projections"),
    ):
        with pytest.raises(Unsupported, match=message):
            swap(model, pattern, positions=spec)
        assert positions.active(model) is None
    scaled = tiny("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    before = logits(scaled)
    with pytest.raises(
        Unsupported,
        match="this model's is changed already, by 'yarn'; valid on top of it are rerope",
    ):
        swap(scaled, positions="pi(factor=2)")
    swap(scaled, positions="rerope(window=64)")
    close(logits(scaled), before)
    dynamic = tiny(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(Unsupported, match="the model's rotary rule 'dynamic' depends on"):
        swap(dynamic, positions="rerope(window=8)")
    with pytest.warns(UserWarning, match="window=128 is not below the 128 tokens"):
        swap(model, positions="rerope(window=128)")
    assert model.config._attn_implementation == live.NAME
