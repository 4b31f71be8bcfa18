"""Structured pruning from checkpoint to checkpoint: the same as in memory, resumed, refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import effattn
from effattn.calibration import from_files as walking
from effattn.errors import Unsupported
from effattn.prune.structural import from_files as structured_files
from tests.conftest import tiny
from tests.surgery.test_from_files import Held, assert_same, saved

LENGTH = 64
CASES = {
    "all, solved again": ("llama", dict(heads=4, ffn=0.25, layers=1, criterion="random")),
    "heads by obs": ("llama", dict(heads=4, length=LENGTH)),
    "two criteria": ("qwen3", dict(heads=1, ffn=24, criterion=dict(heads="flap", ffn="obs"))),
    "layers alone": ("qwen2", dict(layers=1, criterion="block_influence")),
    "nothing solved": ("gemma2", dict(ffn=24, criterion="wanda_sum", compensate=False)),
    "FLAP's biases": ("llama", dict(ffn=0.5, criterion="flap", compensate=False, bias=True)),
    "biases, with weights": ("llama", dict(heads=2, criterion="activation", bias=True)),
    "fused": ("phi3", dict(heads=1, ffn=0.5)),
    "norms over all heads": ("olmo2", dict(heads=1, length=LENGTH)),
}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 96, (1024,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_files_and_memory_give_the_same(case, tokens, tmp_path):
    kind, asked = CASES[case]
    source = saved(tmp_path / "in", kind)
    asked = dict(length=LENGTH, criterion="obs") | asked
    ours = effattn.prune.structured_files(source, tmp_path / "out", tokens, **asked)
    small, theirs = effattn.prune.structured(effattn.load(source), tokens, **asked)
    effattn.save(small, tmp_path / "memory")
    assert_same(tmp_path / "out", tmp_path / "memory")
    for name in ("kept", "importance", "layers", "sizes", "model"):
        assert ours.data[name] == json.loads(json.dumps(theirs.data[name])), name
    first, second = (dict(one.data["settings"], model=None) for one in (ours, theirs))
    assert first == second
    assert ours.data["verification"]["max_difference"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "memory", "out"]


ASKED = dict(
    heads=4,
    layers=1,
    criterion={"heads": "obs", "layers": "block_influence"},
    length=LENGTH,
)


@pytest.mark.parametrize("passed", ["scored", "sliced", "solved"])
def test_a_stopped_run_goes_on_and_ends_the_same(passed, tokens, tmp_path, monkeypatch):
    source = saved(tmp_path / "in")
    prune = effattn.prune.structured_files
    prune(source, tmp_path / "whole", tokens, **ASKED)

    def stop(*_):
        raise KeyboardInterrupt

    def stop_at(walk):  # written, and the manifest does not know
        if walk.work.name == passed:
            raise KeyboardInterrupt
        note(walk)

    note = walking.FileWalk._note
    with monkeypatch.context() as patch:
        patch.setattr(walking.FileWalk, "_note", stop_at)
        if passed == "sliced":
            patch.setattr(structured_files.shards, "write_index", stop)  # all written
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "out", tokens, **ASKED)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished run with another heads"):
        prune(source, tmp_path / "out", tokens, **ASKED | {"heads": 2})
    with pytest.raises(ValueError, match="unfinished run with another"):
        prune(source, tmp_path / "out", tokens[:-64], **ASKED)
    steps = []
    prune(source, tmp_path / "out", tokens, **ASKED, progress=lambda *at: steps.append(at))
    assert steps[-1] == (4, 4)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_run_that_was_killed_behind_its_output_is_over(tokens, tmp_path, monkeypatch):
    source = saved(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(structured_files, "discard", lambda *_: None)
        first = effattn.prune.structured_files(source, tmp_path / "out", tokens, **ASKED)
    monkeypatch.setattr(structured_files._Job, "to_the_end", None)
    second = effattn.prune.structured_files(source, tmp_path / "out", tokens, **ASKED)
    assert first.data == second.data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with pytest.raises(ValueError, match="output: "):  # it is there now
        effattn.prune.structured_files(source, tmp_path / "out", tokens, **ASKED)


def test_bf16_and_what_comes_out_is_plain(tokens, tmp_path):
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "in", max_shard_size="40KB")
    asked = dict(heads=2, ffn=0.5, criterion="obs", length=LENGTH)
    effattn.prune.structured_files(tmp_path / "in", tmp_path / "out", tokens, **asked)
    small, _ = effattn.prune.structured(effattn.load(tmp_path / "in"), tokens, **asked)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    ids = tokens[None, :32]
    assert torch.equal(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (dict(), ValueError, "which removes nothing"),
        (dict(heads=9), ValueError, "heads: got 9, the model has 8 key/value heads"),
        (dict(ffn=0.5, criterion="taylor"), Unsupported, "from file to file valid are 'obs'"),
        (dict(layers=1, criterion="obs"), Unsupported, "'obs' does not rank layers"),
        (dict(ffn=0.5, criterion="ops"), ValueError, "did you mean"),
        (dict(ffn=0.5, length=2000), ValueError, "less than a window"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    asked, error, message, tokens, tmp_path
):
    source = saved(tmp_path / "in")
    with pytest.raises(error, match=message):
        effattn.prune.structured_files(source, tmp_path / "out", tokens, **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_text_that_is_too_short_to_solve_from_is_refused(tokens, tmp_path):
    source = saved(tmp_path / "in")
    with pytest.raises(ValueError, match="at least 600 are needed to solve"):
        effattn.prune.structured_files(source, tmp_path / "out", tokens[:512], ffn=60, length=64)


def test_a_layer_of_each_model_is_in_memory_at_a_time(tokens, tmp_path, monkeypatch):
    source, held = saved(tmp_path / "in", num_hidden_layers=4), Held(monkeypatch)
    effattn.prune.structured_files(source, tmp_path / "out", tokens, ffn=0.5, length=LENGTH)
    model = effattn.load(source)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    assert held.most <= max(*sizes, outside)
