"""One-shot pruning of whole models: every architecture by its own forward, in memory and from file
to file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import effattn
from effattn.calibration.hessian import Hessian
from effattn.hf import anatomy as hf
from effattn.hf.weight_files import INDEX
from effattn.prune.unstructured import calibration, from_files, layers
from effattn.prune.unstructured.from_files import prune_files
from effattn.prune.unstructured.methods.sparsegpt import sparsegpt
from effattn.prune.unstructured.plan import METHODS
from effattn.prune.unstructured.zeros import keep_zeros

KINDS = {  # how many inputs the linear layers of a decoder layer see
    "llama": 4,
    "qwen2": 4,
    "qwen3": 4,
    "mistral": 4,
    "gemma2": 4,
    "gemma3_text": 4,
    "olmo2": 4,
    "phi3": 4,
    "phi": 3,
    "gpt_neox": 4,
    "opt": 4,
    "cohere2": 3,
    "stablelm": 4,
    "glm4": 4,
}
GQA = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "phi3"}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def linear_names(model, modules: str = "all") -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[one] for layer in hf.of(model) for one in layers.linears(layer, modules).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_by_its_own_forward(kind, tokens):
    """The last linear layer was pruned for exactly what it sees in a plain forward of the pruned
    model: so masks, positions and the order of things are the model's own."""
    model = tiny(kind, **({"num_key_value_heads": 2} if kind in GQA else {}))
    before, tokens = weights(model), tokens[:1024]
    report = effattn.prune.oneshot(model, tokens, length=64, sparsity=0.5)
    names = linear_names(model)
    parts = hf.of(model)
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") in names:
            assert int((tensor == 0).sum()) == tensor.numel() // 2, name
        else:
            assert torch.equal(tensor, before[name]), name
    in_a_layer = sum(
        name.startswith(next(n for n, m in model.named_modules() if m is parts.layers[0].block))
        for name in names
    )
    assert in_a_layer == len(report.layers[0]["linears"])
    groups, _ = layers.input_groups(
        layers.linears(parts.layers[0]), lambda: model(input_ids=tokens[None, :64], use_cache=False)
    )
    assert len(groups) == KINDS[kind], groups

    last = dict(parts.layers[-1].block.named_modules())[report.layers[-1]["linears"][-1]["name"]]
    name = next(name for name, module in model.named_modules() if module is last)
    seen = Hessian()
    handle = last.register_forward_pre_hook(lambda _, args: seen.add(args[0]))
    with torch.no_grad():
        for batch in calibration.batches_of(tokens, 64):
            model(input_ids=batch, use_cache=False)
    handle.remove()
    expected = sparsegpt(before[f"{name}.weight"], seen.mean, 0.5).weight
    torch.testing.assert_close(last.weight.detach(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_patterns_modules_and_lists(method, tokens):
    model = tiny("qwen3", num_key_value_heads=2, dtype=torch.bfloat16)
    before = weights(model)
    report = effattn.prune.oneshot(
        model, tokens, length=64, method=method, sparsity=["2:4", 0.25], modules="ffn"
    )
    ffn = linear_names(model, "ffn")
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner not in ffn:
            assert torch.equal(tensor, before[name])
        elif ".0." in name:
            assert ((tensor == 0).view(-1, 4).sum(1) == 2).all()
        else:
            assert int((tensor == 0).sum()) == tensor.numel() // 4
        if owner in ffn:
            assert tensor.dtype == torch.bfloat16
            assert not torch.signbit(tensor[tensor == 0]).any()
    assert [layer["sparsity"] for layer in report.layers] == ["2:4", "0.25"]
    assert all(0 < layer["error"] < 1 for layer in report.layers)
    assert report.sparsity == pytest.approx((0.5 + 0.25) / 2)
    assert "saves no" in report.headline or "as before" in report.headline
    attention = linear_names(model, "attention")
    assert sorted(ffn + attention) == sorted(linear_names(model))


def test_shares_by_sensitivity_keep_the_mean(tokens):
    model = tiny("llama", num_hidden_layers=4, dtype=torch.float32)
    with torch.no_grad():  # a layer with outliers
        model.model.layers[2].mlp.up_proj.weight[::7, ::5] *= 30
    report = effattn.prune.oneshot(
        model, tokens, length=64, method="wanda", sparsity=0.6, allocation="sensitivity"
    )
    shares = [layer["zeros"] / layer["weights"] for layer in report.layers]
    assert sum(shares) / 4 == pytest.approx(0.6, abs=1e-3)
    assert min(shares) == shares[2]
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=1e-3)


def test_in_memory_spilled_and_without_tokens(tokens, tmp_path):
    models = [tiny("llama", dtype=torch.float32) for _ in range(2)]
    effattn.prune.oneshot(models[0], tokens, length=64, sparsity=0.5)
    effattn.prune.oneshot(
        models[1],
        tokens,
        length=64,
        sparsity=0.5,
        spill=tmp_path / "states",
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(one.state_dict().values() for one in models), strict=True)
    )
    assert list((tmp_path / "states").iterdir())
    model = tiny("llama")
    report = effattn.prune.oneshot(model, method="magnitude", sparsity=0.3)
    assert report.layers[0]["error"] is None
    assert "not measured" in report.to_markdown()


def with_nan(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")


def with_overflow(model):
    model.model.layers[1].post_attention_layernorm.weight.data[5] = (
        1e38  # finite, its activations are not
    )


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (None, {"sparsity": 1.2}, ValueError, r"sparsity: got 1\.2, valid is a share from 0 to 1"),
        (None, {"sparsity": "5:4"}, ValueError, "sparsity: got '5:4'"),
        (None, {"sparsity": "4:7"}, ValueError, r"groups of 7, layer 0's self_attn\.q_proj has 64"),
        (None, {"sparsity": [0.5]}, ValueError, "a list of 1, the model has 2 layers"),
        (None, {"sparsity": [0.5, 2]}, ValueError, "sparsity of layer 1: got 2"),
        (None, {"method": "sparsgpt"}, ValueError, "did you mean 'sparsegpt'"),
        (None, {"modules": "atention"}, ValueError, "did you mean 'attention'"),
        (None, {"allocation": "sensitivity", "sparsity": "2:4"}, ValueError, "needs a share"),
        (
            None,
            {"allocation": "sensitivity", "sparsity": 0.02},
            ValueError,
            r"valid is 0\.08 to 0\.92",
        ),
        (None, {"damping": -1}, ValueError, "damping: got -1"),
        (None, {"block": 0}, ValueError, "block: got 0"),
        (None, {"length": 4}, ValueError, "length: got 4"),
        (None, {"tokens": None}, ValueError, "needs calibration tokens"),
        (
            None,
            {"tokens": torch.zeros(63, dtype=torch.int64)},
            ValueError,
            "tokens: got 63, less than a window of 64",
        ),
        (None, {"tokens": torch.full((99,), 96)}, ValueError, "vocabulary is 0 to 95"),
        (None, {"tokens": torch.zeros(99)}, ValueError, "tokens: got torch.float32"),
        (with_nan, {}, ValueError, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
        (
            with_overflow,
            {},
            FloatingPointError,
            r"inputs of model\.layers\.1\.mlp\.gate_proj, up_proj hold NaN or Inf",
        ),
        (
            None,
            {"damping": 0, "tokens": torch.ones(64, dtype=torch.int64)},
            torch.linalg.LinAlgError,
            r"model\.layers\.0\.self_attn\.q_proj, k_proj, v_proj: .* damping 0; give more damping",
        ),
    ],
)
def test_bad_input_changes_nothing(change, arguments, error, message, tokens):
    model = tiny("llama", dtype=torch.float32)
    if change:
        change(model)
    before = weights(model)
    with pytest.raises(error, match=message):
        effattn.prune.oneshot(model, **({"tokens": tokens, "length": 64} | arguments))
    assert (
        all(
            torch.equal(a, b)
            for a, b in zip(before.values(), model.state_dict().values(), strict=True)
        )
        or change
    )


def test_experts_are_refused_and_their_attention_is_not(tokens):
    model = tiny("mixtral", dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"layer 0 includes mlp\..* no plain linear layer.*'attention' may do"
    ):
        effattn.prune.oneshot(model, tokens, length=64)
    report = effattn.prune.oneshot(model, tokens, length=64, modules="attention")
    assert report.sparsity == 0.5


def test_training_keeps_zeros(tokens):
    model = tiny("llama", dtype=torch.float32)
    effattn.prune.oneshot(model, tokens, length=64, method="magnitude", sparsity="2:4")
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items()}
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with keep_zeros(model):
        for _ in range(3):
            model(input_ids=tokens[None, :64], labels=tokens[None, :64]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in linear_names(model):
        weight = model.get_parameter(f"{name}.weight").detach()
        assert torch.equal(weight == 0, zeros[f"{name}.weight"])
        assert not torch.signbit(weight[weight == 0]).any()
        assert not torch.equal(weight, before[f"{name}.weight"])
    with (
        pytest.raises(RuntimeError, match="moved 1 pruned weights"),
        keep_zeros(model),
        torch.no_grad(),
    ):
        weight.view(-1)[int((weight == 0).flatten().nonzero()[0])] = 1.0


# ---- from file to file
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A sharded bf16 checkpoint of four layers with tied embeddings."""
    folder = tmp_path_factory.mktemp("source")
    model = tiny(
        "llama",
        dtype=torch.bfloat16,
        num_hidden_layers=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model.save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


KILLED = """
import os, signal, sys
import torch
from effattn.prune.unstructured import from_files
from effattn.training import lending as training
training.bf16_pays = lambda on_cpu=None: False  # as in the tests' own process
source, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
note = from_files._Run._note
def die(run):
    # the third layer's file is written, the manifest does not know
    if len(run.state["layers"]) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    note(run)
from_files._Run._note = die
tokens = torch.randint(0, 96, (2048,), generator=torch.Generator().manual_seed(0))
from_files.prune_files(source, output, tokens, length=64)
"""


def test_a_killed_run_goes_on_and_ends_the_same(source, tokens, tmp_path):
    before, whole, resumed = snapshot(source), tmp_path / "whole", tmp_path / "resumed"
    facts = prune_files(source, whole, tokens, length=64)
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(source),
        str(resumed),
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(
        command, timeout=300, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    assert done.returncode == -signal.SIGKILL
    assert not resumed.exists()
    with pytest.raises(ValueError, match="unfinished run with another sparsity"):
        prune_files(source, resumed, tokens, length=64, sparsity=0.6)
    with pytest.raises(ValueError, match="unfinished run with another calibration_tokens, tokens"):
        prune_files(source, resumed, tokens[:1024], length=64)
    steps = []
    prune_files(
        source,
        resumed,
        tokens,
        length=64,
        progress=lambda done, total: steps.append(done),
    )
    assert steps == [3, 4]  # one layer's work was lost
    ours, theirs = snapshot(resumed), snapshot(whole)
    for one in (ours, theirs):
        told = json.loads(one.pop("pruning.json"))
        assert [layer["zeros"] for layer in told["layers"]] == [
            layer["zeros"] for layer in facts["layers"]
        ]
    assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]
    assert snapshot(source) == before
    assert facts["verification"]["max_difference"] == 0
    with pytest.raises(ValueError, match=r"output: .* exists and is not an empty folder"):
        prune_files(source, whole, tokens, length=64)


def test_a_run_goes_on_in_the_dtype_that_it_began_in(source, tokens, tmp_path, monkeypatch):
    """Begun where bf16 is fast, killed, and finished where it is not: the same files."""

    def stop(run):
        if len(run.state["layers"]) == 2:
            raise KeyboardInterrupt
        note(run)

    monkeypatch.setattr("effattn.training.lending.bf16_pays", lambda on_cpu=None: True)
    prune_files(source, tmp_path / "whole", tokens, length=64)
    note = from_files._Run._note
    monkeypatch.setattr(from_files._Run, "_note", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_files(source, tmp_path / "resumed", tokens, length=64)
    monkeypatch.setattr(from_files._Run, "_note", note)
    monkeypatch.setattr("effattn.training.lending.bf16_pays", lambda on_cpu=None: False)
    prune_files(source, tmp_path / "resumed", tokens, length=64)
    ours, theirs = snapshot(tmp_path / "resumed"), snapshot(tmp_path / "whole")
    # which has times
    assert {name for name in ours if ours[name] != theirs[name]} <= {"pruning.json"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": "2:4", "modules": "attention"},
        {"sparsity": 0.5, "method": "wanda", "allocation": "sensitivity"},
    ],
)
def test_files_and_memory_give_the_same(arguments, source, tokens, tmp_path):
    prune_files(source, tmp_path / "out", tokens, length=64, **arguments)
    model = AutoModelForCausalLM.from_pretrained(source)
    effattn.prune.oneshot(model, tokens, length=64, **arguments)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    for (name, ours), theirs in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert {name for name, where in index["weight_map"].items() if where == file} == set(
                shard.keys()
            )
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    # weights as readable as the rest
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "gemma3_text"])
def test_other_architectures_from_file_to_file(kind, tokens, tmp_path):
    tiny(kind, dtype=torch.float32).save_pretrained(tmp_path / "in")
    facts = prune_files(
        tmp_path / "in", tmp_path / "out", tokens, length=64, method="wanda", sparsity=0.5
    )
    assert facts["verification"]["max_difference"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pruned = [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name in linear_names(model)
    ]
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in pruned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"mismatched keys: model.norm.weight \(got \(3,\)",
        ),
        (lambda w: w.update({"score.weight": torch.ones(3)}), "unexpected keys: score.weight"),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}),
            r"unexpected keys: model.layers.2",
        ),
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"has no 'model\.layers\.1\.mlp\.up_proj\.weight'",
        ),
    ],
)
def test_files_whose_weights_do_not_fit(change, message, tokens, tmp_path):
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "in")
    stored = load_file(tmp_path / "in" / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        prune_files(tmp_path / "in", tmp_path / "out", tokens, length=64)
    assert not (tmp_path / "out").exists()


def test_files_of_another_kind_of_model_are_refused(tokens, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    effattn.swap(model, "sliding(window=4)")
    effattn.save(model, tmp_path / "swapped")
    reward = transformers.LlamaForSequenceClassification(effattn.restore(model).config)
    reward.save_pretrained(tmp_path / "reward")
    for name, message in (
        ("swapped", "is a swapped checkpoint"),
        ("reward", "LlamaForSequenceClassification"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_files(tmp_path / name, tmp_path / "out", tokens, length=64)


def test_bad_checkpoints_are_refused_by_name(source, tokens, tmp_path):
    with pytest.raises(
        ValueError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"
    ):
        prune_files(tmp_path, tmp_path / "out", tokens)
    model = tiny("llama", dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    model.save_pretrained(tmp_path / "inf")
    with pytest.raises(
        ValueError, match=r"weights: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf \(1 of"
    ):
        prune_files(tmp_path / "inf", tmp_path / "out", tokens, length=64)
    assert not (tmp_path / "out").exists()
    index = json.loads((source / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    for file in source.iterdir():
        (tmp_path / "inf" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "inf" / INDEX).write_text(json.dumps(index))
    # which would be read instead, as transformers does
    (tmp_path / "inf" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no 'model\.norm\.weight'"):
        prune_files(tmp_path / "inf", tmp_path / "other", tokens, length=64)
