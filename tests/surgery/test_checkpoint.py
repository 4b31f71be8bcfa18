"""Checkpoints: all or nothing, plain wherever plain transformers can say it, and never a number
that is not one.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from effattn import embedded, registry
from effattn.hf.placement import check_finite
from effattn.patterns.dense import Dense
from effattn.surgery import checkpoint
from effattn.surgery.swapping import active, restore, swap

TOKENS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_dense_swap_is_saved_as_plain_transformers(model, tmp_path):
    expected = model(TOKENS).logits
    swap(model, "dense")
    assert checkpoint.save(model, tmp_path / "out") == tmp_path / "out"
    assert "effattn" not in (tmp_path / "out" / "config.json").read_text()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(plain(TOKENS).logits, expected)
    assert active(model) is not None  # saving changes nothing
    loaded = checkpoint.load(tmp_path / "out")
    assert active(loaded) is None
    assert torch.equal(loaded(TOKENS).logits, expected)


def test_other_swaps_are_kept_in_the_config_and_applied_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(registry.BACKENDS, "_known", dict(registry.backends()))

    @registry.register("halved")
    class Halved(Dense):
        plain = False

        def attend(self, *args):
            return super().attend(*args) / 2

    swap(model, {"1": "halved(impl='torch')"})
    expected = model(TOKENS).logits
    checkpoint.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["effattn"] == {
        "pattern": {"1": "halved(impl='torch')"}
    }
    loaded = checkpoint.load(tmp_path / "a")
    assert torch.equal(loaded(TOKENS).logits, expected)
    checkpoint.save(restore(loaded), tmp_path / "b")
    assert "effattn" not in (tmp_path / "b" / "config.json").read_text()


LEARNED = {
    "0": "sliding(window=5, sink_logits=True)",
    "1": "longformer(window=4, global_tokens=[0, 3])",
}


@pytest.fixture
def learned(model):
    """Swapped, and trained away from where it began."""
    swap(model, LEARNED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "effattn" in name:
                p.add_(torch.randn_like(p), alpha=0.5)
    return model


def test_what_a_method_learned_is_kept_beside_the_plain_weights(learned, tmp_path):
    expected = learned(TOKENS).logits
    checkpoint.save(learned, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["effattn"] == {
        "pattern": LEARNED
    }
    names = set(load_file(tmp_path / "out" / "effattn.safetensors"))
    assert names == {name for name in learned.state_dict() if "effattn" in name}
    assert not names & set(load_file(tmp_path / "out" / "model.safetensors"))
    loaded = checkpoint.load(tmp_path / "out")
    assert torch.equal(loaded(TOKENS).logits, expected)
    assert checkpoint.load(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16
    # the model's own weights lie there alone, as transformers without effattn reads them
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    for entry in ("effattn", "quantization_config"):
        delattr(config, entry)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=config).eval()
    for restored in (restore(loaded), restore(learned)):
        assert torch.equal(restored(TOKENS).logits, plain(TOKENS).logits)
        assert list(restored.state_dict()) == list(plain.state_dict())


def test_learned_weights_that_do_not_fit_are_an_error(learned, tmp_path):
    checkpoint.save(learned, tmp_path / "out")
    file = tmp_path / "out" / "effattn.safetensors"
    weights = load_file(file)
    sinks = "model.layers.0.self_attn.effattn_pattern.sink_logits"
    for wrong, message in (
        ({name: w for name, w in weights.items() if name != sinks}, f"missing: {sinks}"),
        (weights | {"more": torch.ones(1)}, "unexpected: more"),
        (weights | {sinks: torch.ones(3)}, rf"{sinks}: got \(3,\), expected \(4,\)"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path / "out")
    file.unlink()
    with pytest.raises(
        ValueError, match=r"effattn.safetensors does not fit the swap in config.json, missing: "
    ):
        checkpoint.load(tmp_path / "out")


def test_a_full_folder_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder; nothing was written"):
        checkpoint.save(model, tmp_path)
    with pytest.raises(ValueError, match="is not an empty folder"):
        checkpoint.save(model, tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    checkpoint.save(model, tmp_path / "empty")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    def fail():
        with checkpoint.atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            assert folder.parent == tmp_path
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_as_readable_as_any_other(tmp_path):
    with checkpoint.atomic_folder(tmp_path / "new" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    (tmp_path / "plain").mkdir()
    assert os.stat(tmp_path / "new" / "out").st_mode == os.stat(tmp_path / "plain").st_mode
    assert (tmp_path / "new" / "out" / "sub" / "file").read_text() == "x"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_files_follow_the_umask(umask, learned, tmp_path):
    before = os.umask(umask)
    try:
        checkpoint.save(learned, tmp_path / "out", embedded.tokenizer())
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes.keys() > {
        "model.safetensors",
        "effattn.safetensors",
        "config.json",
        "tokenizer.json",
    }
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_are_refused_by_name(model, tmp_path, value):
    check_finite(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    message = "model.layers.1.mlp.up_proj.weight holds NaN or Inf .1 of 1536 values"
    with pytest.raises(ValueError, match=message):
        checkpoint.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "bad")


@pytest.mark.parametrize(
    "name", ["embeded", "./nowhere", "/no/such/folder", "a/b/c", "no-such-owner-x/no-such-model"]
)
def test_an_unknown_name_is_one_clear_error(offline, name):
    with pytest.raises(
        ValueError, match="not 'embedded', not an existing folder, and not found as a hub name"
    ) as caught:
        checkpoint.load_model(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    # no traceback of the hub library
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert ("did you mean 'embedded'" in str(caught.value)) == (name == "embeded")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        checkpoint.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_model(tmp_path)


def test_dtypes(model, tmp_path):
    checkpoint.save(model, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16
    assert checkpoint.load(tmp_path / "out", dtype=torch.float64).dtype == torch.float64
    assert checkpoint.load(tmp_path / "out").dtype == torch.float32
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        checkpoint.load(tmp_path / "out", dtype="bfloat1")


def test_resolve(tmp_path):
    assert checkpoint.resolve("owner/name-1.0") == "owner/name-1.0"
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.resolve(tmp_path) == str(tmp_path)
    assert checkpoint.resolve("embedded").endswith("model")
