"""Adapters, parametrizations and masks: merged or refused in one line, before anything changes, and
kept by peft.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import tiny
from torch.nn.utils import (
    parametrizations,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)
from torch.nn.utils.parametrize import remove_parametrizations

import effattn
from effattn.errors import Unsupported
from effattn.hf import anatomy as hf
from effattn.hf.adapters import merge, require_own_weights
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model
from effattn.quant.rotation import fold_values

peft = pytest.importorskip("peft")

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "saved": lambda: peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"]),
}
COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, remove_parametrizations),
    "old_weight_norm": (weight_norm, remove_weight_norm),
    "spectral_norm": (parametrizations.spectral_norm, remove_parametrizations),
    "old_spectral_norm": (spectral_norm, remove_spectral_norm),
    "mask": (lambda module: prune.random_unstructured(module, "weight", 0.5), prune.remove),
}
ENTRIES = {
    "convert_gqa": lambda model, tokens, path: effattn.convert_gqa(model, 2, tokens, length=64),
    "baseline": lambda model, tokens, path: effattn.convert_gqa(
        model, 2, method="mean", refit=False
    ),
    "swap_heads": lambda model, tokens, path: effattn.swap(model, heads="mqa", calibration=tokens),
    "swap_projections": lambda model, tokens, path: effattn.swap(
        model, projections="monarch(blocks=4)"
    ),
    "longformer": lambda model, tokens, path: effattn.swap(model, "longformer(window=9)"),
    "oneshot": lambda model, tokens, path: effattn.prune.oneshot(model, method="magnitude"),
    "structured": lambda model, tokens, path: effattn.prune.structured(model, tokens, ffn=48),
    "slice": lambda model, tokens, path: slice_model(model, Keep(layers=torch.tensor([0]))),
    "shear": lambda model, tokens, path: effattn.prune.shear(
        model, effattn.prune.Target(ffn=48), tokens, length=64
    ),
    "pack": lambda model, tokens, path: effattn.prune.pack(model),
    "quantize": lambda model, tokens, path: effattn.quant.quantize_weights(model),
    "rotate": lambda model, tokens, path: fold_values(model),
    "save": lambda model, tokens, path: effattn.save(model, path / "out"),
}


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens[None, :64]).logits


def filled(model, seed: int = 0):
    """Adapters start as nothing: gives theirs weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "ia3_l", "modules_to_save")):
                parameter.add_(
                    0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                )
    return model.eval()


def adapted(name: str):
    model = tiny("llama")
    peft.inject_adapter_in_model(ADAPTERS[name](), model)
    return filled(model)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_every_entry_refuses_before_anything_changes(adapter, entry, tokens, tmp_path):
    model = adapted(adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        Unsupported, match=r"layers\.0\..*merge it first: effattn\.hf\.adapters\.merge\(model\)"
    ) as told:
        ENTRIES[entry](model, tokens, tmp_path)
    assert "\n" not in str(told.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_remedy_works(adapter, tokens, tmp_path):
    model = adapted(adapter)
    expected = logits(model, tokens)
    assert (logits(tiny("llama"), tokens) - expected).abs().max() > 0.1
    assert merge(model) is model
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-5)
    require_own_weights(model)
    assert model.state_dict().keys() == tiny("llama").state_dict().keys()
    effattn.save(model, tmp_path / "out")
    torch.testing.assert_close(
        logits(effattn.load(tmp_path / "out"), tokens), expected, rtol=0, atol=1e-5
    )
    effattn.convert_gqa(model, 2, tokens, length=64)


@pytest.mark.parametrize("state", ["off", "merged", "merged_off", "second"])
@pytest.mark.parametrize("adapter", ["lora", "saved"])
def test_what_is_computed_now_is_what_is_merged(adapter, state, tokens):
    """Adapters that are switched off, merged already, or not the active one."""
    model = adapted(adapter)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    if state == "second":
        peft.inject_adapter_in_model(ADAPTERS[adapter](), model, adapter_name="second")
        filled(model, seed=1)
        for layer in layers:
            layer.set_adapter("second")
    for layer in layers:
        if state.startswith("merged"):
            layer.merge()
        if state.endswith("off"):
            layer.enable_adapters(False)
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(merge(model), tokens), expected, rtol=0, atol=1e-5)
    require_own_weights(model)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_on_one_of_two_tied_embeddings_is_merged_into_that(adapter, tokens, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, **adapter), model)
    expected = logits(filled(model), tokens)
    effattn.save(merge(model), tmp_path / "out")
    for one in (model, effattn.load(tmp_path / "out")):
        torch.testing.assert_close(logits(one, tokens), expected, rtol=0, atol=1e-5)


def test_transformers_own_adapters_are_merged_too(tokens, tmp_path):
    """After add_adapter, save_pretrained writes the adapters alone, until they are merged."""
    model = tiny("llama")
    model.add_adapter(ADAPTERS["lora"]())
    expected = logits(filled(model), tokens)
    with pytest.raises(Unsupported, match="merge it first"):
        effattn.save(model, tmp_path / "out")
    effattn.save(merge(model), tmp_path / "out")
    torch.testing.assert_close(
        logits(effattn.load(tmp_path / "out"), tokens), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("computed", COMPUTED)
def test_computed_weights_are_refused_and_the_remedy_works(computed, tokens):
    change, remedy = COMPUTED[computed]
    model = tiny("llama")
    module = model.model.layers[1].mlp.up_proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(module)
    expected = logits(model, tokens)
    with pytest.raises(
        Unsupported, match=rf"layers\.1\.mlp\.up_proj .*\.{remedy.__name__}\(module, 'weight'\)"
    ):
        effattn.prune.oneshot(model, method="magnitude")
    remedy(module, "weight")
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-6)
    effattn.prune.oneshot(model, method="magnitude")


@pytest.mark.parametrize("entry", [*ENTRIES, "swap"])
def test_wrapped_models_name_the_one_inside(entry, tokens, tmp_path):
    run = (
        ENTRIES | {"swap": lambda model, tokens, path: effattn.swap(model, "sliding(window=9)")}
    )[entry]
    inner = tiny("llama")
    with pytest.raises(
        Unsupported, match=r"got OptimizedModule \(torch.compile\), valid is .*model\._orig_mod"
    ):
        run(torch.compile(inner, backend="eager"), tokens, tmp_path)
    wrapped = peft.get_peft_model(inner, ADAPTERS["lora"]())
    with pytest.raises(
        Unsupported, match=r"got PeftModel.*merge_and_unload\(\).*get_base_model\(\)"
    ):
        run(wrapped, tokens, tmp_path)


@pytest.mark.parametrize("entry", ["convert_gqa", "structured", "swap_projections", "save"])
@pytest.mark.parametrize("part", ["model.layers.1", "model.layers.0.self_attn"])
def test_compiled_parts_are_named(part, entry, tokens, tmp_path):
    model = tiny("llama")
    model.set_submodule(part, torch.compile(model.get_submodule(part), backend="eager"))
    with pytest.raises(
        Unsupported, match=rf"{part} .*model\.set_submodule\('{part}', module\._orig_mod\)"
    ):
        ENTRIES[entry](model, tokens, tmp_path)
    model.set_submodule(part, model.get_submodule(part)._orig_mod)
    ENTRIES[entry](model, tokens, tmp_path)


def test_a_model_that_compiled_itself_is_changed_like_any_other(tokens):
    model, plain = (tiny("llama", num_hidden_layers=1) for _ in range(2))
    model.compile(backend="eager")
    logits(model, tokens)
    for one in (model, plain):
        effattn.convert_gqa(one, 2, tokens, length=128, batch=16, refit=False)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens))


@pytest.mark.parametrize("spec", ["sliding(window=16)", "longformer(window=9, global_tokens=[0])"])
def test_lora_on_a_swapped_model_is_trained_saved_loaded_and_merged(spec, tokens, tmp_path):
    """With peft's own calls: the pattern stays, and Longformer's global projections have no part in
    it.
    """
    wrapped = peft.get_peft_model(effattn.swap(tiny("llama"), spec), ADAPTERS["lora"]())
    plain = logits(wrapped, tokens)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        wrapped(input_ids=tokens[None, :64], labels=tokens[None, :64]).loss.backward()
        optimizer.step()
    trained = logits(wrapped.eval(), tokens)
    assert (trained - plain).abs().max() > 1e-2
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        effattn.swap(tiny("llama"), spec), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(logits(again, tokens), trained)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), trained, rtol=0, atol=1e-5)
    effattn.save(merged, tmp_path / "merged")
    torch.testing.assert_close(
        logits(effattn.load(tmp_path / "merged"), tokens), trained, rtol=0, atol=1e-5
    )


def test_patterns_may_be_swapped_below_adapters(tokens):
    model = adapted("lora")
    before = logits(model, tokens)
    effattn.swap(model, "sliding(window=9)")
    below = logits(model, tokens)
    assert (below - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(merge(model), tokens), below, rtol=0, atol=1e-5)
    assert {row.kv_heads for row in hf.of(model)} == {8}
    torch.testing.assert_close(logits(effattn.restore(model), tokens), before, rtol=0, atol=1e-5)


def test_restore_names_the_model_inside(tokens):
    model = effattn.swap(tiny("llama"), "sliding(window=9)")
    swapped = logits(model, tokens)
    with pytest.raises(Unsupported, match=r"valid is the model inside, model\._orig_mod"):
        effattn.restore(torch.compile(model, backend="eager"))
    torch.testing.assert_close(logits(model, tokens), swapped, rtol=0, atol=0)


def test_generation_below_adapters(tokens):
    """A swap of what is inside a PeftModel is the PeftModel's too, with its cache."""
    wrapped = filled(peft.get_peft_model(tiny("llama"), ADAPTERS["lora"]()))
    effattn.swap(wrapped.get_base_model(), "sliding(window=9)")
    ids = tokens[None, :24]
    found = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for step in range(24, 32):
        assert int(wrapped(input_ids=found[:, :step]).logits[0, -1].argmax()) == int(found[0, step])
    assert len(effattn.describe(wrapped.get_base_model()).layers) == 2


def test_a_folder_with_an_adapter_is_no_checkpoint(tmp_path):
    peft.get_peft_model(tiny("llama"), ADAPTERS["lora"]()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"holds an adapter \(adapter_config.json\); valid is the whole model"
    ):
        effattn.load(tmp_path / "adapter")
