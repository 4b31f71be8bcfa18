"""`recipes/prune_oneshot.py` as users run it, its report, and the numbers it reaches on the
embedded model.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import effattn
from effattn.evaluate.loss import token_losses
from effattn.hf.weight_files import file_bytes
from effattn.prune.unstructured.report import OneShotReport
from effattn.recipes.cli import app
from effattn.recipes.prune_oneshot import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny sharded checkpoint with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = effattn.embedded.tokenizer()
    tiny("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(
        folder, max_shard_size="300KB"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text((ROOT / "effattn" / "hf" / "anatomy.py").read_text(), encoding="utf-8")
    return file


def invoke(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prune", "oneshot", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: tensor == 0 for name, tensor in model.state_dict().items() if "proj" in name}


FAST = (
    "--length",
    "64",
    "--calibration-tokens",
    "1024",
    "--evaluation-tokens",
    "300",
    "--decode-contexts",
    "16",
)


def test_the_recipe_end_to_end(source, text, tmp_path):
    """A real process: methods compared, distilled with the zeros kept, loaded again without
    effattn.
    """
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "recipes" / "prune_oneshot.py",
        "--model",
        source,
        "--output",
        out,
        "--text",
        text,
        "--sparsity",
        "2:4",
        "--sparsity",
        "0.5,0.25",
        "--methods",
        "wanda,magnitude",
        "--distill-tokens",
        "2k",
        *FAST,
    ]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "files, memory and the time of products are as before" in said
    assert "effattn.prune.pack(model) stores 2:4 weights" in said
    report = OneShotReport.load(out)
    data = report.data
    assert [(run["method"], run["sparsity"]) for run in data["runs"]] == [
        ("wanda", "2:4"),
        ("magnitude", "2:4"),
        ("wanda", "0.5, 0.25"),
        ("magnitude", "0.5, 0.25"),
    ]
    assert data["verification"]["fresh_process"]
    assert data["quality"]["distilled"]["kl"] < data["quality"]["pruned"]["kl"]
    assert data["distillation"]["tokens"] == 2000 // 128 * 128
    sizes, pruned = data["sizes"], sum(layer["weights"] for layer in report.layers)
    assert sizes["before"]["parameters"] == sizes["after"]["parameters"]
    assert (
        sizes["before"]["nonzero_parameters"] - sizes["after"]["nonzero_parameters"] == pruned // 2
    )
    assert sizes["before"]["flops_of_nonzeros"] - sizes["after"]["flops_of_nonzeros"] == pruned
    assert sizes["after"]["file_bytes"] == file_bytes(out)
    assert sizes["before"]["kv_bytes_per_token"] == 2 * 2 * 64 * 4
    # exactly, after training
    assert all(((zeros.view(-1, 4).sum(1)) == 2).all() for zeros in zeros_of(out).values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "| wanda | 2:4 |" in report.to_markdown()
    assert {"report.html", "tokenizer.json", "config.json"} <= {path.name for path in out.iterdir()}
    assert "pruning.json" not in {path.name for path in out.iterdir()}


def test_large_models_are_not_loaded_and_come_out_the_same(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr("effattn.surgery.checkpoint.load_model", None)
    code, output = invoke(
        "--model",
        source,
        "--output",
        tmp_path / "out",
        "--text",
        text,
        "--measure",
        "no",
        *FAST,
        "--methods",
        "magnitude",
        "--sparsity",
        0.3,
    )
    assert code == 0, output
    assert "quality" not in json.loads((tmp_path / "out" / "report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source)
    effattn.prune.oneshot(model, method="magnitude", sparsity=0.3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_saved_can_be_packed(source, text, tmp_path):
    """Without a model in memory before; and what cannot be is refused before any work."""
    given = ("--model", source, "--text", text, "--measure", "no", *FAST, "--methods", "magnitude")
    code, output = invoke(*given, "--output", tmp_path / "out", "--pack", "bitmask")
    assert code == 0, output
    assert "Packed (bitmask), the linear layers take" in output
    report = OneShotReport.load(tmp_path / "out")
    facts = report.data["packing"]
    assert facts["packed_layers"] == 14
    assert facts["bytes_after"] < 0.55 * facts["bytes_before"]
    assert report.data["verification"]["max_logit_difference"] == 0
    before, after = (report.data["sizes"][when]["file_bytes"] for when in ("before", "after"))
    assert after == file_bytes(tmp_path / "out") < before
    model = AutoModelForCausalLM.from_pretrained(source)
    effattn.prune.oneshot(model, method="magnitude", sparsity=0.5)
    again = effattn.load(tmp_path / "out")
    ids = torch.arange(30)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert "| packed layers | 14 |" in report.to_markdown()

    for pack, said in (
        ("2:4", "pack: '2:4' cannot hold weights of sparsity 0.5; valid for them are 'bitmask'"),
        ("bitmasks", "did you mean 'bitmask'"),
    ):
        code, output = invoke(*given, "--output", tmp_path / "other", "--pack", pack)
        assert code == 2, output
        assert said in output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_refuses_other_settings(source, text, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    arguments = (
        "--model",
        source,
        "--output",
        tmp_path / "out",
        "--text",
        text,
        "--measure",
        "no",
        *FAST,
    )
    monkeypatch.setattr("effattn.prune.unstructured.from_files._Run.write_rest", killed)
    code, output = invoke(*arguments)
    assert code == 130
    assert "run the same command again" in output
    monkeypatch.undo()
    code, output = invoke(*arguments, "--sparsity", "0.7")
    assert code == 2
    assert "unfinished run with another sparsities" in output
    code, output = invoke(*arguments)
    assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_defaults_are_those_of_the_library():
    from effattn.calibration.hessian import DAMPING
    from effattn.prune.unstructured.plan import METHODS

    defaults = Settings(output=Path("out"))
    assert (defaults.methods, defaults.damping) == (METHODS, DAMPING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", "1.5"), "sparsity: got '1.5', valid is a share from 0 to 1"),
        (("--sparsity", "5:4"), "sparsity: got '5:4'"),
        (("--sparsity", "0.5,0.5,0.5"), "a list of 3, the model has 2 layers"),
        (("--methods", "sparsegpd"), "did you mean 'sparsegpt'"),
        (("--modules", "mlp"), "modules: got 'mlp'"),
        (("--calibration-tokens", "50"), "tokens: got 50, less than a window of 64"),
        (("--text", "none.txt"), "none.txt does not exist"),
        (("--model", "no/such-model"), "which is no folder"),
        (("--model", "."), "has no config.json"),
        (("--output", "."), "exists and is not an empty folder"),
        (("--measure", "no", "--distill-tokens", "1k"), "needs the whole model in memory"),
        (("--distill-tokens", "10M"), "more than 20 passes"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(arguments, message, source, text, tmp_path):
    given = {"--model": source, "--output": tmp_path / "out", "--text": text}
    given |= dict(zip(FAST[::2], FAST[1::2], strict=True)) | dict(
        zip(arguments[::2], arguments[1::2], strict=True)
    )
    code, output = invoke(*(part for pair in given.items() for part in pair))
    assert code == 2, output
    assert message in output
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_loses_least_by_sparsegpt():
    """On less data than the documentation's numbers, so that it stays quick."""
    dense, _ = effattn.embedded.load()
    calibration, held_out = (
        effattn.embedded.tokens("train", 16_384),
        effattn.embedded.tokens("validation", 4097),
    )
    before = token_losses(dense, held_out, 512).mean().item()

    def excess(tokens, **options) -> float:
        model = copy.deepcopy(dense)
        effattn.prune.oneshot(model, tokens, sparsity=0.5, **options)
        return token_losses(model, held_out, 512).mean().item() - before

    ours, magnitude = excess(calibration), excess(None, method="magnitude")
    assert 0 < ours <= 0.6 * magnitude
