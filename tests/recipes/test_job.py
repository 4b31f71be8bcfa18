"""`recipes/convert_gqa.py` as users run it: on a checkpoint folder of their own, with their own
text; every way to get it wrong ends in one line, a non-zero exit and nothing written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from effattn.recipes import convert_gqa as jobs
from effattn.recipes.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """A tiny checkpoint with a tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("parent")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [""], trainers.BpeTrainer(vocab_size=257, special_tokens=["<e>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>").save_pretrained(folder)
    tiny("llama", dtype=torch.float32, vocab_size=257).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text((ROOT / "effattn" / "hf" / "anatomy.py").read_text(), encoding="utf-8")
    return file


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def invoke(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert-gqa", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


FAST = (
    "--decode-contexts",
    "32,64",
    "--evaluation-tokens",
    "600",
    "--length",
    "64",
    "--calibration-tokens",
    "4k",
)


def test_the_recipe_end_to_end(parent, text, tmp_path):
    """A real process runs the recipe; the result loads in plain transformers with its tokenizer."""
    before, out = snapshot(parent), tmp_path / "out"
    recipe = ROOT / "recipes" / "convert_gqa.py"
    command = [
        sys.executable,
        recipe,
        "--model",
        parent,
        "--kv-heads",
        "2",
        "--text",
        text,
        "--output",
        out,
        "--uptrain-tokens",
        "20k",
        "--batch",
        "2",
        "--ce-weight",
        "0",
        "--lr",
        "1e-3",
        "--layer-weight",
        "0",
        "--trainable",
        "all",
        *FAST,
    ]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 -> 2 KV heads" in done.stdout
    assert str(out / "report.html") in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["verification"]["fresh_process"]
    assert report["verification"]["kv_heads_in_cache"] == 2
    assert report["kv_bytes_per_token"] == {"before": 2 * 2 * 8 * 8 * 4, "after": 2 * 2 * 2 * 8 * 4}
    assert report["uptraining"]["tokens"] == 20_000 // 128 * 128
    assert report["quality"]["uptrained"]["kl"] < report["quality"]["converted"]["kl"]
    assert [row["context"] for row in report["decode"]] == [32, 64]
    assert report["settings"]["calibration_source"] == str(text)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads == 2
    ids, theirs = (
        AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]
        for folder in (out, parent)
    )
    assert ids == theirs
    assert snapshot(parent) == before  # the parent is never modified
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no temporary folders stay


def test_a_dataset_folder_calibrates_too(parent, text, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = [
        json.dumps({"id": i, "text": line}) for i, line in enumerate(text.read_text().splitlines())
    ]
    (data / "train.jsonl").write_text("\n".join(lines))
    code, output = invoke(
        "--model",
        parent,
        "--kv-heads",
        4,
        "--dataset",
        data,
        "--output",
        tmp_path / "out",
        "--method",
        "mean",
        "--no-refit",
        *FAST,
    )
    assert code == 0, output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["method"] == "mean"
    assert report["settings"]["refit"] is False
    assert report["layers"][0]["attention_error"] is None
    code, output = invoke(
        "--model",
        parent,
        "--kv-heads",
        4,
        "--dataset",
        data,
        "--column",
        "txt",
        "--output",
        tmp_path / "no",
    )
    assert code == 2
    assert "the text columns 'text'" in output


def broken(parent: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the parent whose weights hold a NaN."""
    folder = tmp_path / name
    model = AutoModelForCausalLM.from_pretrained(parent)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(parent).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown model", "not an existing folder"),
        ("folder without a model", "no config.json"),
        (
            "heads that do not divide",
            "kv_heads: got 3, the model has 8 KV heads; valid are the divisors 1, 2, 4, 8",
        ),
        ("unknown method", "did you mean 'aligned'"),
        ("output not empty", "exists and is not an empty folder"),
        ("missing text", "does not exist"),
        ("empty text", "is empty"),
        ("not utf-8", "is not UTF-8 .byte 3 is 0xff"),
        ("too little text", "32,768 tokens are to be held out to measure on, .* has 480"),
        ("nan", r"model\.layers\.0\.mlp\.up_proj\.weight"),
        ("text and dataset", "valid is one of them"),
        ("contexts", "decode_contexts: got 'abc'"),
        ("class that ignores the field", "GPTNeoXForCausalLM cannot have fewer KV heads"),
        ("refused class", "BloomForCausalLM .bloom. is not supported"),
        ("missing dataset", "could not be loaded"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(case, message, parent, text, tmp_path):
    files, output = tmp_path / "in", tmp_path / "out"
    files.mkdir()
    arguments = {"--model": parent, "--kv-heads": 2, "--output": output, "--text": text}
    if case == "unknown model":
        arguments["--model"] = "no/such-model-anywhere"
    elif case == "folder without a model":
        arguments["--model"] = files
    elif case == "heads that do not divide":
        arguments["--kv-heads"] = 3
    elif case == "unknown method":
        arguments["--method"] = "alligned"
    elif case == "output not empty":
        arguments["--output"] = parent
    elif case == "missing text":
        arguments["--text"] = files / "none.txt"
    elif case == "nan":
        arguments["--model"] = broken(parent, files, "nan")
    elif case == "text and dataset":
        arguments["--dataset"] = "wikitext"
    elif case == "contexts":
        arguments["--decode-contexts"] = "abc"
    elif case == "missing dataset":
        arguments["--dataset"] = files / "nothing"
        del arguments["--text"]
    elif "class" in case:
        if case.startswith("refused"):
            from transformers import BloomConfig, BloomForCausalLM

            config = BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=257)
            BloomForCausalLM(config).save_pretrained(files)
        else:
            tiny("gpt_neox", dtype=torch.float32, vocab_size=257).save_pretrained(files)
        AutoTokenizer.from_pretrained(parent).save_pretrained(files)
        arguments["--model"] = files
    else:
        content = {
            "empty text": b" \n",
            "not utf-8": b"abc\xff",
            "too little text": b"hello " * 80,
        }[case]
        arguments["--text"] = files / "text.txt"
        arguments["--text"].write_bytes(content)
    before = snapshot(tmp_path), snapshot(parent)
    code, printed = invoke(*[part for pair in arguments.items() for part in pair])
    assert code == 2
    import re

    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in printed
    assert (snapshot(tmp_path), snapshot(parent)) == before
    assert not output.exists()


def test_a_full_disk_leaves_what_was_measured(parent, text, tmp_path, monkeypatch):
    def full(self, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, printed = invoke(
        "--model", parent, "--kv-heads", 2, "--text", text, "--output", tmp_path / "out", *FAST
    )
    assert code == 2
    assert "No space left on device" in printed
    assert [one.name for one in tmp_path.iterdir()] == [".out.partial"]  # what was measured


def test_a_checkpoint_that_reloads_differently_is_not_delivered(
    parent, text, tmp_path, monkeypatch
):
    """The proof in a fresh process can fail, and then there is no output."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def tampered(self, folder, *args, **kwargs):
        self.lm_head.weight.data.add_(1e-2)
        save(self, folder, *args, **kwargs)
        self.lm_head.weight.data.sub_(1e-2)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", tampered)
    code, printed = invoke(
        "--model", parent, "--kv-heads", 2, "--text", text, "--output", tmp_path / "out", *FAST
    )
    assert code == 2
    assert "gives other logits" in printed
    assert [one.name for one in tmp_path.iterdir()] == [".out.partial"]  # what was measured


def test_a_kill_half_way_resumes_and_other_settings_are_refused(
    parent, text, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    job = dict(
        model=str(parent),
        kv_heads=2,
        output=output,
        text=(text,),
        calibration_tokens=4000,
        evaluation_tokens=600,
        uptrain_tokens=20 * 128,
        length=64,
        batch=2,
        decode_contexts=(),
    )

    class Dies(jobs.Quiet):
        def stage(self, name):
            from contextlib import nullcontext

            def progress(done, total):
                if name.startswith("uptraining") and done == 15:
                    raise KeyboardInterrupt

            return nullcontext(progress)

    with pytest.raises(KeyboardInterrupt):
        jobs.run(jobs.Settings(**job), Dies())
    assert not output.exists()
    partial = tmp_path / ".out.partial"
    assert partial.is_dir()
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(lr\)"):
        jobs.run(jobs.Settings(**job, lr=1e-3))
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(model\)"):
        jobs.run(jobs.Settings(**{**job, "model": "nowhere"}))  # said before a model is looked for
    resumed = jobs.run(jobs.Settings(**job))
    assert not partial.exists()
    whole = jobs.run(jobs.Settings(**{**job, "output": tmp_path / "whole"}))
    assert resumed.data["uptraining"]["curve"] == whole.data["uptraining"]["curve"]
    assert (output / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_backends_command():
    result = CliRunner().invoke(app, ["backends", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["dense"]["exact"] is True
    assert "dense" in CliRunner().invoke(app, ["backends"]).output


@pytest.mark.parametrize("text_value", ["50k", "50_000", "50000", "0.05M"])
def test_token_counts_are_read_as_people_write_them(text_value):
    from effattn.recipes.options import count_of

    assert count_of(text_value) == 50_000


def test_what_was_measured_before_a_kill_is_gone_on_from(parent, text, tmp_path):
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    job = dict(model=str(parent), kv_heads=2, text=(text,), calibration_tokens=2000)
    job |= dict(evaluation_tokens=600, length=64, decode_contexts=(), output=output)

    class Stages(jobs.Quiet):
        def __init__(self, dies=""):
            self.dies, self.steps = dies, {}

        def stage(self, name):
            from contextlib import nullcontext

            if name == self.dies:
                raise KeyboardInterrupt
            return nullcontext(lambda done, total: self.steps.setdefault(name, done))

    with pytest.raises(KeyboardInterrupt):
        jobs.run(jobs.Settings(**job), Stages("saving, and loading again without effattn"))
    assert list(json.loads((partial / "parts.json").read_text())["parts"]) == [
        "parent",
        "converted",
    ]
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(kv_heads\)"):
        jobs.run(jobs.Settings(**{**job, "kv_heads": 1}))
    again = Stages()
    resumed = jobs.run(jobs.Settings(**job), again)
    assert not [name for name in again.steps if name.startswith("measuring")]
    assert not partial.exists()
    whole = jobs.run(jobs.Settings(**{**job, "output": tmp_path / "whole"}))
    assert resumed.data["quality"] == whole.data["quality"]


def test_what_no_ffn_can_be_refitted_with_is_told_before_a_model_is_loaded(tmp_path):
    given = {"model": str(tmp_path / "none"), "kv_heads": 1, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match="refit_ffn: got True with refit=False"):
        jobs.run(jobs.Settings(**given, refit=False, refit_ffn=True))
    assert not list(tmp_path.iterdir())
