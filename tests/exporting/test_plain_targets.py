"""Exports that are plain checkpoints: windows by a class that has them; what is said of vLLM."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import SMALL
from safetensors.torch import load_file

import effattn
from effattn import embedded
from effattn.errors import Unsupported
from effattn.exporting import capabilities
from effattn.hf import loading, uneven
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model
from effattn.states import caches

IDS = torch.arange(3, 63).view(
    2,
    30,
)
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 3072}


def tiny(kind: str, **settings):
    torch.manual_seed(0)
    config = getattr(
        transformers,
        f"{kind}Config",
    )(**SMALL | SHAPE | settings)
    return getattr(
        transformers,
        f"{kind}ForCausalLM",
    )(config).eval()


def exported(model, tmp_path, to="transformers", **options):
    effattn.save(
        model,
        tmp_path / "model",
        embedded.tokenizer(),
    )
    return effattn.export(
        tmp_path / "model",
        to=to,
        output=tmp_path / "out",
        **options,
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("sliding(window=4)", marks=pytest.mark.slow),
        {"1": "sliding(window=8)"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "becomes"),
    [
        ("Llama", "Ministral"),
        pytest.param("Qwen2", "Qwen2", marks=pytest.mark.slow),
        pytest.param("Qwen3", "Qwen3", marks=pytest.mark.slow),
    ],
)
def test_windows_are_a_classs_own(kind, becomes, pattern, tmp_path):
    model = effattn.swap(
        tiny(kind),
        pattern,
    )
    report = exported(
        model,
        tmp_path,
        check=True,
    )
    assert f"{becomes}ForCausalLM's own" in report.data["notes"][0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(loaded).__name__ == f"{becomes}ForCausalLM"
    assert torch.allclose(
        logits(loaded),
        logits(model),
        atol=1e-5,
    )
    assert not torch.allclose(
        logits(effattn.restore(model)),
        logits(loaded),
        atol=1e-3,
    )
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = loaded.generate(
        IDS,
        use_cache=False,
        **options,
    )
    assert torch.equal(
        loaded.generate(IDS, **options),
        whole,
    )


@pytest.mark.parametrize(
    "swap",
    [
        {"pattern": "sliding(window=4, sinks=1)"},
        {"pattern": {"0": "sliding(window=4)", "1": "sliding(window=8)"}},
        {"pattern": "sliding(window=4)", "cache": "int8(group=16)"},
    ],
    ids=str,
)
def test_what_no_class_does_is_refused_and_never_dense(swap, tmp_path):
    with pytest.raises(
        Unsupported,
        match=r"transformers cannot express",
    ):
        exported(
            effattn.swap(tiny("Llama"), **swap),
            tmp_path,
        )
    assert not (tmp_path / "out").exists()


def test_windows_of_a_llama_with_biases_are_refused(tmp_path):
    model = effattn.swap(
        tiny("Llama", attention_bias=True),
        "sliding(window=4)",
    )
    with pytest.raises(
        Unsupported,
        match=r"sliding\(window=4\) in layers 0, 1",
    ):
        exported(model, tmp_path)


def test_layers_that_differ_are_not_for_transformers_alone(tmp_path):
    keep = Keep(ffn=[torch.arange(32), torch.arange(64)])
    small = slice_model(
        tiny("Llama"),
        keep,
        uniform=False,
    )
    with pytest.raises(
        Unsupported,
        match="layers that differ",
    ):
        exported(small, tmp_path)


def test_zeros_are_unpacked(tmp_path):
    model = tiny("Llama")
    effattn.prune.oneshot(
        model,
        torch.arange(3000),
        method="magnitude",
        sparsity=0.7,
    )
    expected = logits(model)
    effattn.prune.pack(
        model,
        format="bitmask",
    )
    report = exported(
        model,
        tmp_path,
        check=True,
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(
        logits(loaded),
        expected,
    )
    assert report.data["check"]["max_logit_difference"] < 1e-4
    assert "effattn" not in (tmp_path / "out" / "config.json").read_text()


def test_vllm_is_told_and_not_run(tmp_path):
    report = exported(
        tiny("Llama"),
        tmp_path,
        to="vllm",
    )
    assert report.data["check"] is None
    assert "no server was run" in report.data["notes"][0]
    assert "not run in vLLM here" in report.headline
    assert "no multiple of 256" in " ".join(report.data["notes"])


def test_a_class_that_vllm_has_not(tmp_path):
    with pytest.raises(
        Unsupported,
        match="none of the classes that vLLM's sources list",
    ):
        exported(
            tiny("Helium", head_dim=16),
            tmp_path,
            to="vllm",
        )


def test_the_table_answers_for_every_engine_and_is_in_every_report(tmp_path):
    assert all(len(row) == 1 + len(capabilities.ENGINES) for row in capabilities.table())
    report = exported(tiny("Llama"), tmp_path)
    shown = report.to_markdown()
    assert all(part.said in shown for part in capabilities.PARTS)


def test_rows_of_single_members_are_of_members_that_there_are():
    members = {"pattern": effattn.backends(), "cache": caches.kinds()}
    for part in capabilities.PARTS:
        assert set(part.members) <= set(members.get(part.name, ()))


SINGLE = {
    "topk(window=8, blocks=2)": {"pattern": "topk(window=8, blocks=2)"},
    "gated": {"pattern": "gated"},
    "hybrid(window=8)": {"pattern": "hybrid(window=8)"},
    "evict(policy='norm', keep=0.5)": {"cache": "evict(policy='norm', keep=0.5)"},
}


@pytest.mark.parametrize("spec", SINGLE)
@pytest.mark.parametrize("to", ["transformers", "vllm", "openvino", "gguf"])
def test_a_form_with_a_row_of_its_own_is_refused_by_it(spec, to):
    model = effattn.swap(tiny("Llama"), **SINGLE[spec])
    (said,) = capabilities.lost(model, to)
    name = spec.partition("(")[0]
    row = next(part for part in capabilities.PARTS if name in part.members)
    assert said == f"{capabilities_specs(model)} ({row.said}): {row.runs[to]}"


def capabilities_specs(model) -> str:
    ((_, said),) = capabilities.parts_of(model)
    assert said.endswith("in layers 0, 1")
    return said


def test_forms_of_one_axis_are_told_apart():
    model = effattn.swap(tiny("Llama"), {"0": "topk(window=8)", "1": "sliding(window=8, sinks=2)"})
    first, second = capabilities.lost(model, "gguf")
    assert first.startswith("topk(window=8) in layers 0 (`topk`")
    assert second.startswith("sliding(window=8, sinks=2) in layers 1 (another pattern")


@pytest.mark.parametrize("pattern", [None, {"1": "sliding(window=8)"}])
def test_pages_are_a_full_cache_elsewhere(pattern, tmp_path):
    """Which has the same bits: nothing is lost, and it is said."""
    model = tiny("Llama")
    effattn.swap(model, **({"pattern": pattern} if pattern else {}), cache={"0": "paged(page=4)"})
    report = exported(model, tmp_path)
    assert torch.equal(logits(effattn.load(tmp_path / "out")), logits(model))
    assert report.data["notes"][0] == f"pages in 1 layers are {capabilities.PAGES}"
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == ("llama" if pattern is None else "ministral")
    assert "effattn" not in said


def test_onnx_is_refused_with_what_to_take(tmp_path):
    with pytest.raises(Unsupported, match=r"^to: got 'onnx', which is not here: .*to='openvino'$"):
        effattn.export("embedded", to="onnx", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- vLLM's conventions
# -------------------------------------------------------------------------------------------------


def as_served(folder):
    """The model that `block_configs` describe, built by what AnyModel reads of them."""
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["AnyModel"]
    assert said["model_type"] == "anymodel"
    assert "auto_map" not in said
    assert "per_layer_config" not in said
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    config = transformers.LlamaConfig.from_dict(
        said | {"model_type": "llama", "architectures": None}
    )
    layers = {}
    for index, block in enumerate(said["block_configs"]):
        parts = {"attention": "attention", "mlp": "ffn"}
        skip = [name for name, part in parts.items() if block[part]["no_op"]]
        own = {"skip": skip} if skip else {}
        if not block["attention"]["no_op"]:
            own["num_key_value_heads"] = block["attention"]["num_key_value_heads"]
            groups = said["num_attention_heads"] // block["attention"]["n_heads_in_group"]
            assert groups == own["num_key_value_heads"]
        if not block["ffn"]["no_op"]:
            own["intermediate_size"] = block["ffn"]["intermediate_size"]
        layers[index] = own
    uneven.set_overrides(config, layers)
    cls = getattr(transformers, said["base_architecture"])
    return loading.from_state(cls, config, state, torch.float32)


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_layers_that_differ_are_block_configs(settings, tmp_path):
    keep = Keep(
        heads=[torch.arange(count) for count in (2, 1, 0, 1)],
        ffn=[torch.arange(width) for width in (64, 32, 64, 0)],
    )
    model = tiny("Llama", num_hidden_layers=4, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = slice_model(model, keep, uniform=False)
    report = exported(model, tmp_path, to="vllm")
    served = as_served(tmp_path / "out")
    assert torch.allclose(logits(served), logits(model), atol=1e-5)
    assert "4 of 16 query heads are zeros" in " ".join(report.data["notes"])


def test_heads_that_no_number_of_queries_fits_are_named(tmp_path):
    model = tiny("Llama", num_attention_heads=8, num_key_value_heads=8)
    keep = Keep(heads=[torch.arange(8), torch.arange(5)])
    small = slice_model(model, keep, uniform=False)
    with pytest.raises(Unsupported, match=r"5, 8 K/V heads.*40, more than 2 times the 8"):
        exported(small, tmp_path, to="vllm")


def test_windows_are_never_dense_in_vllm(tmp_path):
    report = exported(effattn.swap(tiny("Llama"), {"1": "sliding(window=8)"}), tmp_path, to="vllm")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == "ministral"
    assert said["layer_types"] == ["full_attention", "sliding_attention"]
    assert "Transformers backend" in " ".join(report.data["notes"])


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_windows_that_vllms_class_refuses_are_refused(kind, tmp_path):
    model = effattn.swap(tiny(kind), {"1": "sliding(window=8)"})
    with pytest.raises(Unsupported, match=r"vLLM cannot express.*sliding\(window=8\)"):
        exported(model, tmp_path, to="vllm")


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_scales_of_an_fp8_cache_are_the_largest_of_the_text(kind, tmp_path):
    model, tokens = tiny(kind), torch.randint(0, 3000, (40,))
    report = exported(model, tmp_path, to="vllm", kv_cache="fp8", kv_skip=[0], calibration=tokens)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["kv_cache_scheme"]["num_bits"] == 8
    assert said["kv_cache_scheme"]["strategy"] == "tensor"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: one for name, one in weights.items() if name.endswith("_scale")}
    base = "model.layers.1.self_attn"
    assert set(scales) == {f"{base}.k_proj.k_scale", f"{base}.v_proj.v_scale"}
    with torch.no_grad():
        layer = model(tokens[None]).past_key_values.layers[1]
    for name, held in (("k_proj.k", layer.keys), ("v_proj.v", layer.values)):
        scale = scales[f"{base}.{name}_scale"]
        assert scale.shape == (1,)
        assert scale.dtype == torch.float32
        torch.testing.assert_close(scale[0] * 448, held.abs().max())
    others = {name: one for name, one in weights.items() if name not in scales}
    for name, one in model.state_dict().items():
        assert torch.equal(others.pop(name), one)
    assert not others
    assert "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0" in " ".join(report.data["notes"])


def test_scales_have_a_text_of_their_own(tmp_path):
    exported(tiny("Llama"), tmp_path, to="vllm", kv_cache="fp8")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(name.endswith("_scale") for name in names) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "fp9"}, "did you mean 'fp8'"),
        ({"kv_cache": "fp8", "kv_skip": [2]}, "kv_skip: got layer 2, valid are 0 to 1"),
        ({"kv_cache": "fp8", "kv_skip": [0, 1]}, "got all layers"),
        ({"kv_skip": [0]}, "kv_skip: it is of kv_cache"),
        ({"kv_cache": "fp8", "to": "transformers"}, "it is of to='vllm'"),
        ({"kv_cache": "fp8", "calibration": torch.tensor([3])}, "two tokens"),
    ],
)
def test_bad_scales_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        exported(tiny("Llama"), tmp_path, **{"to": "vllm"} | options)
    assert not (tmp_path / "out").exists()
