"""Conversions of models that do not fit into memory, by their commands."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import effattn
from effattn import outputs
from effattn.hf.source import load_tokenizer
from effattn.profiling import memory
from effattn.prune.structural import from_files as structured_files
from effattn.recipes import convert_gqa, convert_latent, layerwise, prune_structured
from effattn.recipes.layerwise import TOO_LARGE
from effattn.surgery import from_files
from tests.flows import save_small


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("layerwise")
    save_small(root)
    return root


def small(place, output, **more):
    given = dict(calibration_tokens=640, evaluation_tokens=128, length=32, decode_contexts=())
    given["measure"] = "no"
    files = dict(model=str(place / "model"), text=(place / "text.txt",), output=output)
    return convert_gqa.Settings(kv_heads=2, **{**given, **files, **more})


def test_from_file_to_file_is_what_memory_gives(place, tmp_path):
    report = convert_gqa.run(small(place, tmp_path / "out"))
    assert report.data["settings"]["measure"] == "no"
    assert report.data["quality"] is None
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verification"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    convert_gqa.run(small(place, tmp_path / "memory", measure="yes"))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("out", "memory")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_that_is_stopped_as_it_saves_goes_on(place, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "link_or_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_gqa.run(small(place, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # nothing is converted again
    monkeypatch.setattr(from_files, "convert_files", stop)
    report = convert_gqa.run(small(place, tmp_path / "out"))
    assert report.data["verification"]["tokens"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_what_does_not_fit_goes_from_file_to_file_and_says_so(place, tmp_path, monkeypatch):
    given = dict(
        calibration_tokens=640,
        evaluation_tokens=128,
        length=32,
        decode_contexts=(),
        model=str(place / "model"),
        text=(place / "text.txt",),
    )
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    output = tmp_path / "out"
    settings = convert_latent.Settings(rank=8, output=output, refit=False, **given)
    report = convert_latent.run(settings)
    assert report.data["settings"]["measure"] == TOO_LARGE
    assert TOO_LARGE in (output / "report.md").read_text()
    model = effattn.load(output)
    assert {layer["heads"] for layer in effattn.describe(model).layers} == {"latent(rank=8)"}
    for more in ({"measure": "yes"}, {"uptrain_tokens": 512}):
        settings = convert_latent.Settings(rank=8, output=tmp_path / "other", **given, **more)
        with pytest.raises(ValueError, match="measure: comparing and training need about"):
            convert_latent.run(settings)
    settings = convert_latent.Settings(
        rank=8, output=tmp_path / "other", measure="no", uptrain_tokens=512, **given
    )
    with pytest.raises(ValueError, match="uptrain_tokens: got some with measure 'no'"):
        convert_latent.run(settings)
    assert not (tmp_path / "other").exists()


def narrow(place, output, **more):
    given = dict(calibration_tokens=1024, evaluation_tokens=128, length=32, decode_contexts=())
    files = dict(model=str(place / "model"), text=(place / "text.txt",), output=output)
    how = dict(ffn=0.5, criteria=("obs",), measure="no")
    return prune_structured.Settings(**{**given, **files, **how, **more})


def test_structures_go_from_file_to_file_as_in_memory(place, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as it saves: nothing is done again
        patch.setattr(outputs, "link_or_copy", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_structured.run(narrow(place, tmp_path / "out"))
    settings = narrow(place, tmp_path / "out")
    assert "the same command" in settings.stopped()
    with pytest.raises(ValueError, match="unfinished run with other settings"):
        prune_structured.run(narrow(place, tmp_path / "out", ffn=0.25))
    with monkeypatch.context() as patch:
        patch.setattr(structured_files, "structured_files", stop)
        report = prune_structured.run(settings)
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert report.data["settings"]["measure"] == "no"
    assert report.data["quality"] is None
    sizes = report.data["sizes"]
    assert 0 < sizes["after"]["file_bytes"] < sizes["before"]["file_bytes"]
    assert "FFN dimensions" in (tmp_path / "out" / "report.md").read_text()
    model = effattn.load(place / "model")
    tokens, _ = layerwise.read(settings, load_tokenizer(place / "model"))
    small, _ = effattn.prune.structured(model, tokens, ffn=0.5, criterion="obs", length=32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_what_structures_cannot_do_from_file_to_file(place, tmp_path):
    for more, message in (
        ({"uneven": True}, "uneven: got True"),
        ({"criteria": ("taylor",)}, "criterion: got 'taylor'"),
        ({"measure": "maybe"}, "measure: got 'maybe'"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_structured.run(narrow(place, tmp_path / "out", **more))
        assert not any(tmp_path.iterdir())
