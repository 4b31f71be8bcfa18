"""The structured pruning job from end to end on a tiny checkpoint, its report, and what it
refuses.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import effattn
from effattn.prune.structural.report import StructuredReport
from effattn.recipes import cli
from effattn.recipes.prune_structured import Settings, parse_amount, parse_criterion, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "model"
    model = tiny(
        "mistral", dtype=torch.float32, vocab_size=3072, hidden_size=32, num_key_value_heads=4
    )
    model.save_pretrained(folder)
    effattn.embedded.tokenizer().save_pretrained(folder)
    return folder


def job(checkpoint, output, **changes) -> Settings:
    settings = dict(
        model=str(checkpoint),
        output=output,
        heads=3,
        ffn=0.25,
        criteria=("taylor", "heads=activation,ffn=flap"),
        calibration_tokens=1024,
        evaluation_tokens=256,
        length=64,
        decode_contexts=(16,),
        device="cpu",
    )
    return Settings(**(settings | changes))


def test_layers_that_differ(checkpoint, tmp_path):
    report = run(
        job(
            checkpoint,
            tmp_path / "out",
            uneven=True,
            heads=2,
            ffn=None,
            criteria=("random",),
            seed=3,
        )
    )
    kept = [len(heads) for heads in report.data["kept"]["heads"]]
    assert sum(kept) == 4
    assert len(set(kept)) == 2
    assert report.data["settings"]["uniform"] is False
    assert report.data["verification"]["max_logit_difference"] < 1e-4
    model = effattn.load(tmp_path / "out")
    assert "per_layer_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    found = effattn.perplexity(model, effattn.embedded.tokens("validation", 256), 64)
    assert report.data["quality"]["pruned"]["perplexity"] == pytest.approx(found, rel=1e-4)


def test_the_whole_job(checkpoint, tmp_path):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    report = run(job(checkpoint, tmp_path / "out"))
    assert before == {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"report.json", "report.md", "report.html", "model.safetensors", "config.json"} <= files
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # nothing temporary stays

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (
        6,
        3,
        72,
    )
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    sizes = data["sizes"]
    assert sizes["after"]["parameters"] == model.num_parameters() < sizes["before"]["parameters"]
    assert sizes["after"]["kv_bytes_per_token"] * 4 == sizes["before"]["kv_bytes_per_token"] * 3
    assert sizes["after"]["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sizes["before"]["file_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert sizes["after"]["flops_per_token"] < sizes["before"]["flops_per_token"]
    assert data["verification"]["fresh_process"]
    assert [(run["criterion"], run["compensation"]) for run in data["runs"]] == [
        ("taylor", "weights"),
        ("taylor", "nothing"),
        ("heads=activation, ffn=flap", "weights"),
        ("heads=activation, ffn=flap", "nothing"),
    ]
    held_out = effattn.embedded.tokens("validation", 256)
    assert data["quality"]["pruned"]["perplexity"] == pytest.approx(
        effattn.perplexity(model, held_out, 64), rel=1e-4
    )
    assert data["decode"][0]["after"]["kv_bytes"] * 4 == data["decode"][0]["before"]["kv_bytes"] * 3
    assert len(data["importance"]["ffn"][0]) == 101

    again = StructuredReport.load(tmp_path / "out")
    assert again.headline == report.headline
    assert "3 of 4 key/value heads, 72 of 96 FFN dimensions" in report.headline
    page = report.to_html()
    assert page.count("<figure") == 4  # heads, FFN dimensions, criteria, errors
    assert "Criteria compared" in report.to_markdown()


def test_layers_alone_need_no_solving(checkpoint, tokens):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    small, report = effattn.prune.structured(
        model, tokens, layers=1, criterion="block_influence", length=64
    )
    assert small.config.num_hidden_layers == 1
    assert report.layers == []
    assert "Kept 1 of 2 layers" in report.headline
    assert report.excess is None
    assert report.to_html().count("<figure") == 1  # importance
    assert "Perplexity" not in report.to_markdown()


def test_amounts_and_criteria_as_people_write_them():
    assert [parse_amount("ffn", text) for text in ("528", "0.25", "25%", None, "all")] == [
        528,
        0.25,
        0.25,
        None,
        None,
    ]
    assert parse_criterion("heads=flap, layers=random") == {"heads": "flap", "layers": "random"}
    with pytest.raises(ValueError, match="ffn: got 'few', valid is like 4"):
        parse_amount("ffn", "few")
    with pytest.raises(ValueError, match="criterion: got 'headz'"):
        parse_criterion("headz=flap")
    with pytest.raises(ValueError, match="kind: got 'x'"):
        StructuredReport({"kind": "x"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "heads, ffn, layers: got none"),
        (["--ffn", "25%", "--criterion", "tailor"], "did you mean 'taylor'"),
        (["--ffn", "25%", "--device", "gpu"], "device: got 'gpu'"),
        (["--ffn", "97"], "ffn: got 97, the model has 96 FFN dimensions a layer"),
        (["--layers", "1", "--criterion", "flap"], "'flap' does not rank layers"),
        (
            ["--ffn", "25%", "--calibration-tokens", "100", "--length", "64"],
            "tokens: got 100, at least 720 are needed",
        ),
        (
            ["--ffn", "25%", "--bias", "--calibration-tokens", "2k"],
            "cannot have a bias in its FFN's output module",
        ),
        (["--ffn", "25%", "--output", "taken"], "exists and is not an empty folder"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    options, message, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    done = CliRunner().invoke(
        cli.app,
        ["prune", "structured", "--model", str(checkpoint), "--output", "out", *options],
        catch_exceptions=False,
    )
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["taken"]
    assert (tmp_path / "taken" / "file").read_text() == "mine"
