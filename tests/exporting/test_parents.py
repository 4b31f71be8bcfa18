"""The parent that an export is measured beside: what its configuration tells of it, and that its
weights are read once."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny

import effattn
from effattn import embedded
from effattn.exporting import capabilities, llama_cpp, plain
from effattn.exporting import export as exporting
from effattn.prune.structural.keep import Keep
from effattn.prune.structural.slicing import slice_model
from effattn.surgery import checkpoint


def llama():
    """A random model that the embedded tokenizer fits."""
    return tiny("llama", vocab_size=3100, dtype=torch.float32)


def saved(model, folder):
    return effattn.save(model, folder, embedded.tokenizer())


def outlined(model, folder):
    """What is known of a checkpoint without its weights, and with them."""
    saved(model, folder)
    found = []
    for load in (checkpoint.outline, checkpoint.load_model):
        one, tokenizer = load(folder)
        one, notes = plain.windows(one)
        shapes = {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
        found.append((type(one), notes, [*capabilities.parts_of(one)], shapes, len(tokenizer)))
    return found


@pytest.mark.parametrize(
    "form", ["plain", "windows", "sinks and int8", "learned", "layers", "latent", "zeros"]
)
def test_an_outline_tells_what_the_model_would(form, tmp_path):
    model = llama()
    ids = torch.arange(1024) % 96
    if form == "windows":
        effattn.swap(model, {"1": "sliding(window=8)"})
    elif form == "sinks and int8":
        effattn.swap(model, "sliding(window=8, sinks=2)", cache="int8", positions="nope")
    elif form == "learned":
        effattn.swap(model, "linear(feature_map='hedgehog')")
    elif form == "layers":
        keep = Keep(heads=[*map(torch.arange, (4, 2))], ffn=[*map(torch.arange, (64, 0))])
        model = slice_model(model, keep, uniform=False)
    elif form == "latent":
        effattn.swap(model, heads="latent(ratio=0.5)", calibration=ids)
    elif form == "zeros":
        effattn.prune.oneshot(model, ids, method="magnitude", sparsity=0.5)
        effattn.prune.pack(model, format="bitmask")
    outline, whole = outlined(model, tmp_path / "model")
    assert outline == whole


def test_the_parent_is_loaded_once(tmp_path, monkeypatch):
    """Refused by its outline at the start; its weights are read when its file is written."""
    pytest.importorskip("gguf")
    folder, read = saved(llama(), tmp_path / "model"), []

    def load_model(name):
        read.append(str(name))
        return checkpoint.load_model(name)

    def speeds(engine, folder, before, text, contexts):
        assert (before / llama_cpp.FILE).is_file()
        return []

    monkeypatch.setattr(exporting, "load_model", load_model)
    monkeypatch.setattr(exporting.checking, "speeds", speeds)
    monkeypatch.setattr(exporting.checking, "compare", lambda *given: {"engine": "none"})
    monkeypatch.setattr(llama_cpp, "require", lambda: None)
    effattn.export(folder, to="gguf", output=tmp_path / "out", check=True, before="embedded")
    assert read == [str(folder), "embedded"]
