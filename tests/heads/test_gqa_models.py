"""Every class that can hold fewer KV heads is converted, saved, and loaded by plain
transformers.
"""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM

from effattn.errors import Unsupported
from effattn.heads.gqa import convert_gqa
from effattn.hf import anatomy as hf
from effattn.quant.rotation import fold_values
from effattn.surgery import projecting
from effattn.surgery.swapping import restore, swap

KINDS = sorted(kind for kind, family in hf.FAMILIES.items() if not family.gqa)
NORMED = {
    "stablelm": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
    "phi": {"qk_layernorm": True},
}


@torch.no_grad()
def run(model, tokens):
    return model(input_ids=tokens[:96].view(2, 48), use_cache=True)


@pytest.mark.parametrize(("kind", "extra"), [*((k, {}) for k in KINDS), *NORMED.items()])
def test_converted_models_reload_in_plain_transformers(kind, extra, tokens, tmp_path):
    model = tiny(kind, dtype=torch.float32, **extra)
    parameters = model.num_parameters()
    fewer = 1 if kind == "gpt_bigcode" else 2  # which holds all heads, or one
    report = convert_gqa(model, fewer, tokens, length=64)
    assert len(report.data["layers"]) == 2
    assert model.num_parameters() == report.data["model"]["parameters_after"] < parameters
    expected = run(model, tokens)
    assert torch.isfinite(expected.logits).all()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    found = run(again, tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    for layer, part in zip(found.past_key_values.layers, hf.of(again), strict=True):
        assert layer.keys.shape[1] == layer.values.shape[1] == part.kv_heads == fewer
    assert again.config.num_key_value_heads == fewer
    assert getattr(again.config, "head_dim", part.head_dim) == part.head_dim


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_mqa_and_a_second_reduction(kind, tokens):
    model = tiny(kind, num_key_value_heads=4)
    convert_gqa(model, 2, tokens, length=64)
    report = convert_gqa(model, 1, tokens, length=64)
    assert report.data["model"]["kv_heads_before"] == 2
    assert (
        report.data["kv_bytes_per_token"]["after"] * 2
        == report.data["kv_bytes_per_token"]["before"]
    )
    assert run(model, tokens).past_key_values.layers[0].keys.shape[1] == 1


def test_module_objects_and_hooks_stay(tokens):
    model, calls = tiny("llama"), []
    layer = model.model.layers[0].self_attn
    layer.k_proj.register_forward_hook(lambda *_: calls.append(1))
    modules = [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj]
    convert_gqa(model, 2, tokens, length=64)
    calls.clear()
    run(model, tokens)
    assert calls == [1]
    assert modules == [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj]
    assert layer.k_proj.out_features == 2 * 8


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kv_heads": 3},
            "kv_heads: got 3, the model has 8 KV heads; valid are the divisors 1, 2, 4, 8",
        ),
        ({"kv_heads": 16}, "valid are the divisors"),
        ({"kv_heads": 0}, "valid are the divisors"),
        ({"kv_heads": 2.0}, "valid are the divisors"),
        ({"kv_heads": True}, "valid are the divisors"),
        ({"refit_ffn": True, "refit": False}, "refit_ffn: got True with refit=False"),
        ({"refit_ffn": "no"}, "refit_ffn: got 'no', valid are True and False"),
        ({"refit": 0}, "refit: got 0, valid are True and False"),
        ({"method": "optimul"}, "method: got 'optimul' .did you mean 'optimal'"),
        ({"grouping": "similar"}, "did you mean 'similarity'"),
        ({"calibration": None}, "calibration: got None, method 'optimal' needs tokens"),
        ({"calibration": None, "method": "mean"}, "calibration: got None, refit=True needs tokens"),
        (
            {"calibration": torch.zeros(639, dtype=torch.int64)},
            "got 639 tokens, at least 640 are needed",
        ),
        (
            {"calibration": torch.zeros(2, 640, dtype=torch.int64)},
            r"got torch.int64 \(2, 640\), valid is",
        ),
        ({"calibration": torch.zeros(640)}, "got torch.float32"),
        ({"calibration": [1, 2]}, "got list"),
        ({"calibration": torch.full((640,), 96)}, "vocabulary is 0 to 95"),
        ({"length": 0}, "length: got 0, valid is a number of tokens"),
        ({"length": 64.0}, "length: got 64.0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(arguments, message, tokens):
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert_gqa(model, **{"kv_heads": 2, "calibration": tokens, **arguments})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_key_value_heads == 8


def test_windows_longer_than_the_text_are_refused(tokens):
    model = tiny("llama", max_position_embeddings=9000)
    with pytest.raises(
        ValueError, match="length: got windows of 8,192 tokens, calibration has 2,048"
    ):
        convert_gqa(model, 2, tokens, length=8192)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("phi3", {}),
        ("olmo2", {}),
        ("stablelm", {"qk_layernorm": True}),
    ],
)
def test_all_or_nothing(kind, extra, error, tokens):
    """An error in the last of all steps leaves the same parameters, modules, sizes and config."""
    model = tiny(kind, **extra).train()
    expected, before = run(model.eval(), tokens).logits, snapshot(model.train())
    parameters, config = dict(model.named_parameters()), model.config.to_dict()

    def fail(done: int, total: int) -> None:
        if done == total:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        convert_gqa(model, 2, tokens, length=64, progress=fail)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one is parameters[name] for name, one in model.named_parameters())
    assert model.config.to_dict() == config
    assert model.training
    assert torch.equal(run(model.eval(), tokens).logits, expected)
    assert {(layer.kv_heads, layer.k.module.out_features) for layer in hf.of(model)} in (
        {(8, 64)},
        {(8, 3 * 64)},  # Phi-3's is fused
    )
    convert_gqa(model, 2, tokens, length=64)
    assert model.config.num_key_value_heads == 2


def test_heads_and_projections_are_changed_both_or_neither(tokens, monkeypatch):
    model = tiny("llama")
    expected, before = run(model, tokens).logits, snapshot(model)

    def stop(plan):
        assert hf.of(model).kv_heads == 2
        raise KeyboardInterrupt

    change = {
        "heads": "gqa(kv_heads=2, length=64)",
        "projections": "monarch(blocks=4)",
        "calibration": tokens,
    }
    monkeypatch.setattr(projecting, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        swap(model, **change)
    monkeypatch.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_key_value_heads == 8
    assert torch.equal(run(model, tokens).logits, expected)
    swap(model, **change)
    assert hf.of(model).kv_heads == 2


@pytest.mark.parametrize("part", ["norm", "q", "k", "v", "o"])
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "optimal"), ("glm", "optimal"), ("qwen2", "aligned")]
)
def test_a_dead_layer_is_converted_to_a_dead_layer(kind, method, part, tokens):
    """What is 0 tells nothing about heads: whatever is made of it is finite and of the usual
    size.
    """
    model = tiny(kind, dtype=torch.float32)
    layer = hf.of(model).layers[1]
    dead = layer.block.input_layernorm if part == "norm" else getattr(layer, part).module
    torch.nn.init.zeros_(dead.weight)
    largest = max(float(p.detach().abs().max()) for p in layer.attention.parameters())
    report = convert_gqa(model, 2, tokens, method=method, length=64)
    assert all(
        0 <= report.layers[1][name] <= 1.5 for name in ("k_error", "v_error", "attention_error")
    )
    assert torch.isfinite(run(model, tokens).logits).all()
    assert max(float(p.detach().abs().max()) for p in layer.attention.parameters()) < 10 * largest


@pytest.mark.parametrize("spec", ["longformer(window=9, global_tokens=[0])", "vq(codes=8)"])
def test_what_a_swap_learned_for_its_heads_is_refused(spec, tokens):
    model = swap(tiny("llama"), spec)
    before = snapshot(model)
    with pytest.raises(
        Unsupported, match=r"layer 0 has what .* learned for its 8 K/V heads; effattn\.restore"
    ):
        convert_gqa(model, 2, tokens, length=64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    convert_gqa(restore(model), 2, tokens, length=64)


@pytest.mark.parametrize(
    "change", [{"pattern": "sliding(window=9, sink_logits=True)"}, {"positions": "alibi"}]
)
def test_heads_of_a_swapped_model_do_not_change_places(change, tokens):
    model = swap(tiny("llama"), **change)
    with pytest.raises(
        Unsupported, match="grouping: 'similarity' moves heads, and LlamaForCausalLM is swapped"
    ):
        convert_gqa(model, 2, tokens, length=64, grouping="similarity")
    convert_gqa(model, 2, tokens, length=64)
    assert hf.of(model).kv_heads == 2
    assert torch.isfinite(run(model, tokens).logits).all()


def test_global_projections_refuse_turned_values():
    model = swap(tiny("llama"), "longformer(window=9, global_tokens=[0])")
    with pytest.raises(Unsupported, match="layer 0 has global projections beside its own"):
        fold_values(model)


def test_nan_weights_are_refused_by_name(tokens):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        convert_gqa(model, 2, tokens)


@pytest.mark.parametrize("kind", ["gpt_neox", "opt"])
def test_classes_that_ignore_the_field_are_refused_untouched(kind, tokens):
    model = tiny(kind)
    before = snapshot(model)
    with pytest.raises(Unsupported, match=f"{type(model).__name__}.*ignores num_key_value_heads"):
        convert_gqa(model, 2, tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_mode_and_batches_of_another_size_survive(tokens):
    """The calibration rest (a smaller last batch) counts too, and the model's mode comes back."""
    model = tiny("llama").train()
    convert_gqa(model, 2, tokens[:1100], length=64, batch=8)  # 17 windows: 8 + 8 + 1
    assert model.training
