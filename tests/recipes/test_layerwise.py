"""Conversions of models that do not fit into memory, by their commands."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import effattn
from effattn.profiling import memory
from effattn.recipes import convert_gqa, convert_latent
from effattn.recipes.layerwise import TOO_LARGE

SMALL = dict(calibration_tokens=2560, evaluation_tokens=256, length=128, decode_contexts=())


def test_from_file_to_file_is_what_memory_gives(tmp_path):
    settings = convert_gqa.Settings(
        kv_heads=2, output=tmp_path / "out", measure="no", refit=False, **SMALL
    )
    report = convert_gqa.run(settings)
    assert report.data["settings"]["measure"] == "no"
    assert report.data["quality"] is None
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verification"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    settings = convert_gqa.Settings(
        kv_heads=2, output=tmp_path / "memory", measure="yes", refit=False, **SMALL
    )
    convert_gqa.run(settings)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "memory").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_does_not_fit_goes_from_file_to_file_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    output = tmp_path / "out"
    settings = convert_latent.Settings(rank=64, output=output, refit=False, **SMALL)
    report = convert_latent.run(settings)
    assert report.data["settings"]["measure"] == TOO_LARGE
    assert TOO_LARGE in (output / "report.md").read_text()
    model = effattn.load(output)
    assert {layer["heads"] for layer in effattn.describe(model).layers} == {"latent(rank=64)"}
    for given in ({"measure": "yes"}, {"uptrain_tokens": 512}):
        settings = convert_latent.Settings(rank=64, output=tmp_path / "other", **SMALL, **given)
        with pytest.raises(ValueError, match="measure: comparing and training need about"):
            convert_latent.run(settings)
    settings = convert_latent.Settings(
        rank=64, output=tmp_path / "other", measure="no", uptrain_tokens=512, **SMALL
    )
    with pytest.raises(ValueError, match="uptrain_tokens: got some with measure 'no'"):
        convert_latent.run(settings)
    assert not (tmp_path / "other").exists()
