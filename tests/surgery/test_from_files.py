"""Conversions from checkpoint to checkpoint: the same as in memory, resumed, checked, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import effattn
from effattn.calibration import from_files as walking
from effattn.errors import Unsupported
from effattn.hf import weight_files
from effattn.surgery.from_files import FACTS, convert_files
from tests.conftest import tiny

LENGTH = 64


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, kind: str = "llama", **options) -> Path:
    """A tiny checkpoint of several shards."""
    model = tiny(kind, dtype=torch.float32, **options)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / weight_files.INDEX).is_file()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    found = {}
    for file in {one.file for one in weight_files.stored(folder).values()}:
        with safe_open(folder / file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit, and the same configuration."""
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    configs = [json.loads((one / "config.json").read_text()) for one in (ours, theirs)]
    for config in configs:
        for name in ("transformers_version", "architectures", "head_dim"):
            config.pop(name, None)
    assert configs[0] == configs[1]


CASES = {
    "optimal": ("llama", {"heads": "gqa(kv_heads=2, length=64)"}),
    "ffn re-fit": ("llama", {"heads": "gqa(kv_heads=1, length=64, refit_ffn=True)"}),
    "few at a time": ("llama", {"heads": "gqa(kv_heads=1, length=64, batch=3, refit=False)"}),
    "similar, with norms": (
        "qwen3",
        {"heads": "gqa(kv_heads=1, length=64, grouping='similarity')"},
    ),
    "fused, with a bias": ("phi3", {"heads": "mqa(length=64)"}),
    "latent of a rank": ("llama", {"heads": "latent(rank=8, length=64)"}),
    "latents by spectra": ("qwen2", {"heads": "latent(ratio=0.5, length=64)"}),
    "low rank by spectra": ("llama", {"projections": "lowrank(ratio=0.6, ffn=True)"}),
    "low rank without data": ("llama", {"projections": "lowrank(rank=4, method='svd')"}),
    "other layers stay": ("llama", {"projections": {"1": "monarch(blocks=2)"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_files_and_memory_give_the_same(case, tokens, tmp_path):
    kind, asked = CASES[case]
    source = saved(tmp_path / "in", kind)
    convert_files(source, tmp_path / "out", tokens, **asked)
    model = effattn.load(source)
    effattn.swap(model, calibration=tokens, **asked)
    effattn.save(model, tmp_path / "memory")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert json.loads((tmp_path / "out" / FACTS).read_text())["verification"]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "memory", "out"]
    ids = tokens[None, :32]
    with torch.no_grad():
        again = effattn.load(tmp_path / "out")(ids).logits
        torch.testing.assert_close(again, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_report_says_what_it_says_in_memory(tokens, tmp_path):
    source = saved(tmp_path / "in")
    ours = convert_files(source, tmp_path / "out", tokens, heads="gqa(kv_heads=2, length=64)")
    theirs = effattn.convert_gqa(effattn.load(source), 2, tokens, length=LENGTH)
    for name in ("settings", "layers", "kv_bytes_per_token"):
        first, second = (dict(one.data)[name] for one in (ours, theirs))
        if name == "settings":
            first, second = ({**one, "model": None} for one in (first, second))
        assert first == second, name
    assert ours.data["model"] == theirs.data["model"]
    assert ours.data["verification"]["max_difference"] == 0
    assert "quality was not measured" in ours.headline


@pytest.mark.parametrize("spec", ["gqa(kv_heads=2, length=64)", "latent(ratio=0.5, length=64)"])
def test_a_stopped_run_goes_on_and_ends_the_same(spec, tokens, tmp_path, monkeypatch):
    source = saved(tmp_path / "in")
    convert_files(source, tmp_path / "whole", tokens, heads=spec)
    note = walking.FileWalk._note

    def stop(walk):
        if len(walk.state.get("layers", [])) == 2:  # written, and the manifest does not know
            raise KeyboardInterrupt
        note(walk)

    monkeypatch.setattr(walking.FileWalk, "_note", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_files(source, tmp_path / "out", tokens, heads=spec)
    monkeypatch.setattr(walking.FileWalk, "_note", note)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished run with another"):
        convert_files(source, tmp_path / "out", tokens[:-64], heads=spec)
    with pytest.raises(ValueError, match="unfinished run with another heads"):
        convert_files(source, tmp_path / "out", tokens, heads="mqa(length=64)")
    steps = []
    convert_files(
        source, tmp_path / "out", tokens, heads=spec, progress=lambda *at: steps.append(at)
    )
    assert len(steps) < 4
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_fault_in_a_file_leaves_no_output(tokens, tmp_path, monkeypatch):
    source, whole = saved(tmp_path / "in"), walking.FileWalk.write_rest

    def damage(walk):
        whole(walk)
        file = walk.out / walk._file(1)
        held = weight_files.read(file, weight_files.header(file))
        held["model.layers.1.self_attn.o_proj.weight"] *= 1.01
        from safetensors.torch import save_file

        save_file(held, file, {"format": "pt"})

    monkeypatch.setattr(walking.FileWalk, "write_rest", damage)
    with pytest.raises(RuntimeError, match="other hidden states"):
        convert_files(source, tmp_path / "out", tokens, heads="mqa(length=64)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "got heads=None and projections=None"),
        ({"heads": "mqa", "projections": "lowrank(rank=4)"}, "valid is one of them"),
        ({"heads": "mqq"}, "did you mean"),
        ({"heads": "gqa(kv_heads=3)"}, "valid are the divisors 1, 2, 4, 8"),
        ({"heads": "gqa(kv_heads=8)"}, "nothing to do"),
        ({"heads": "latent(ratio=7)"}, "latent: ratio: got 7"),
        ({"heads": "gqa(kv_heads=2, method='best')"}, "method: got 'best'"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_written(asked, message, tokens, tmp_path):
    source = saved(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        convert_files(source, tmp_path / "out", tokens, **asked)
    with pytest.raises(ValueError, match="calibration: got None"):
        convert_files(source, tmp_path / "out", None, heads="mqa")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_classes_that_cannot_hold_fewer_heads_are_refused(tokens, tmp_path):
    source = saved(tmp_path / "in", "opt")
    with pytest.raises(Unsupported, match="cannot have fewer KV heads"):
        convert_files(source, tmp_path / "out", tokens, heads="mqa")


class Held:
    """How many numbers of decoder layers are there at once, at most."""

    def __init__(self, monkeypatch):
        self.most, fill = 0, walking.StreamedModel._filled

        def counted(model, root, prefix, **options):
            def now():
                held = [p.numel() for p in model.parts.model.parameters() if not p.is_meta]
                self.most = max(self.most, sum(held))

            manager = fill(model, root, prefix, **options)

            class Watched:
                def __enter__(self):
                    manager.__enter__()
                    now()

                def __exit__(self, *error):
                    now()
                    return manager.__exit__(*error)

            return Watched()

        monkeypatch.setattr(walking.StreamedModel, "_filled", counted)


@pytest.mark.parametrize("asked", [CASES["optimal"][1], CASES["low rank by spectra"][1]])
def test_one_layer_is_in_memory_at_a_time(asked, tokens, tmp_path, monkeypatch):
    source, held = saved(tmp_path / "in"), Held(monkeypatch)
    convert_files(source, tmp_path / "out", tokens, **asked)
    model = effattn.load(source)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    assert held.most <= max(*sizes, outside)
