"""The shearing recipe: domains from text, the whole job, its resumption, its report, the command
line, bad input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from typer.testing import CliRunner

import effattn
from effattn.hf import verify
from effattn.prune.shearing import data as shear_data
from effattn.prune.shearing import mask_stage, masks, measures, rates, sheared
from effattn.prune.shearing.data import domain_text, stdlib_domain
from effattn.prune.shearing.report import BASELINES, ShearReport
from effattn.recipes.cli import app
from effattn.recipes.shear import Settings, run

CPU = {"use_cpu": True}
SMALL = {
    "heads": 4,
    "ffn": 48,
    "mask_tokens": 768,
    "recover_tokens": 256,
    "continue_tokens": 512,
    "evaluation_tokens": 512,
    "length": 128,
    "batch": 2,
    "decode_contexts": (),
    "warm_start": None,
    "overrides": CPU,
}
PROSE = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 100
CODE = (
    "def add(a, b):\n    return a + b\n\n\nclass Box:\n    def __init__(self, x):\n        self.x "
    "= x\n\n" * 100
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    """A file and a folder: two domains."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prose.txt").write_text(PROSE)
    (folder / "code").mkdir()
    (folder / "code" / "a.py").write_text(CODE)
    (folder / "code" / "ignored.bin").write_bytes(b"\xff\xfe")
    return folder / "prose.txt", folder / "code"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A checkpoint of a tiny random model with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    tiny("llama", dtype=torch.float32, vocab_size=3072, tie_word_embeddings=True).save_pretrained(
        folder
    )
    effattn.embedded.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory, texts, source):
    folder = tmp_path_factory.mktemp("shear") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "SECONDS", 0.1)
        return run(
            Settings(
                model=source, output=folder, domains=texts, baselines=tuple(BASELINES), **SMALL
            )
        ), folder


def test_the_embedded_corpus_has_domains_by_path():
    names = {
        "asyncio/tasks.py": "network",
        "test/test_os.py": "tests",
        "idlelib/idle_test/x.py": "tests",
        "os.py": "modules",
        "tkinter/ttk.py": "tools",
        "json/decoder.py": "packages",
    }
    assert {path: stdlib_domain(path) for path in names} == names
    found = domain_text(effattn.embedded.tokenizer(), train=2000, evaluation=1000)
    assert list(found.train) == ["modules", "network", "packages", "tests", "tools"]
    assert {len(tokens) for tokens in found.train.values()} == {2000}
    assert max(found.proportions, key=found.proportions.get) == "tests"
    assert torch.equal(found.evaluation, effattn.embedded.tokens("validation", 1000))


def test_files_and_folders_are_domains_with_text_held_out(texts):
    tokenizer = effattn.embedded.tokenizer()
    found = domain_text(tokenizer, train=800, evaluation=100, domains=texts)
    assert list(found.train) == ["prose", "code"]
    for name, text in (("prose", PROSE), ("code", CODE)):
        assert text.startswith(tokenizer.decode(found.train[name])[:200])
    assert len(found.evaluation) == 100
    assert found.evaluation_source == f"{found.source}, held out"


def test_domains_hold_out_what_was_asked_for(texts):
    tokenizer, name = effattn.embedded.tokenizer(), "prose"
    whole = {
        n: len(t)
        for n, t in domain_text(tokenizer, train=10**7, evaluation=0, domains=texts).train.items()
    }
    found = domain_text(tokenizer, train=100, evaluation=400, domains=texts)
    assert len(found.evaluation) == 400
    with pytest.raises(ValueError, match=r"domain: .* are to be held out to measure on"):
        domain_text(tokenizer, train=100, evaluation=2 * whole[name] + 2, domains=texts)
    apart = domain_text(
        tokenizer, train=10**7, evaluation=50, domains=texts[1:], evaluation_text=texts[:1]
    )
    assert len(apart.train["code"]) == whole["code"]
    assert PROSE.startswith(tokenizer.decode(apart.evaluation)[:100])
    assert apart.evaluation_source == str(texts[0])


def test_the_job_saves_a_plain_checkpoint_of_the_shape(done):
    report, folder = done
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"], config["head_dim"]) == (
        4,
        48,
        8,
    )
    assert "effattn" not in config
    size, quality = report.data["size"], report.data["quality"]
    inside = size["after"]["layer_parameters"] / size["before"]["layer_parameters"]
    assert inside == pytest.approx(0.5, abs=5e-3)
    assert size["after"]["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert size["after"]["kv_bytes_per_token"] * 2 == size["before"]["kv_bytes_per_token"]
    assert size["after"]["flops_per_token"] < size["before"]["flops_per_token"]
    tokens = domain_text(
        effattn.embedded.tokenizer(),
        train=1536,
        evaluation=512,
        domains=[Path(part) for part in report.data["settings"]["domains"]],
    ).evaluation
    measured = effattn.perplexity(effattn.load(folder), tokens, min(128, len(tokens) - 1))
    assert quality["continued"]["perplexity"] == pytest.approx(measured, rel=1e-4)
    assert report.data["verification"]["fresh_process"]
    assert report.data["masks"]["max_logit_difference"] < 1e-3
    assert not folder.with_name(".out.partial").exists()


def test_baselines_have_the_same_shape_and_tokens(done):
    report, _ = done
    rows = report.data["baselines"]
    assert list(rows) == ["scratch", "structured", "taught"]
    for row in rows.values():
        assert row["training"]["tokens"] == report.tokens == 1536
        assert row["parameters"] == report.data["size"]["after"]["parameters"]
    assert rows["structured"]["cut"]["kl"] < rows["scratch"]["cut"]["kl"]
    assert rows["taught"]["cut"] == rows["structured"]["cut"]
    tokens = [point["tokens"] for point in rows["taught"]["training"]["record"]]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 1536


def test_the_report_says_the_same_in_every_form(done):
    report, folder = done
    again = ShearReport.load(folder)
    assert again.headline == report.headline
    assert "KV heads 8 -> 4, FFN dimensions 96 -> 48" in report.headline
    assert again.to_html().count("<svg") == 5
    for text in (again.to_html(), again.to_markdown()):
        assert "the same shape from scratch" in text
        assert "Domain weights" in text
        assert "1,024 of the sheared model&#39;s tokens taught" in text.replace("'", "&#39;")
        assert "one-shot pruning by taylor, taught by the parent" in text
    with pytest.raises(ValueError, match="kind: got 'x'"):
        ShearReport({"kind": "x"})


def test_a_killed_job_goes_on_and_ends_the_same(done, texts, source, tmp_path, monkeypatch):
    _, folder = done
    job = Settings(model=source, output=tmp_path / "out", domains=texts, **SMALL)
    monkeypatch.setattr(
        sheared, "continue_training", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not job.output.exists()
    monkeypatch.undo()
    for module, slow in ((verify, "verify_plain"), (measures, "speeds")):
        # the first test of the job has them
        monkeypatch.setattr(module, slow, lambda *args: [])
    with pytest.raises(ValueError, match=r"other settings \(start\)"):
        run(Settings(model=source, output=tmp_path / "out", domains=texts, start=1.0, **SMALL))
    run(job)
    ours, theirs = (dict(effattn.load(f).named_parameters()) for f in (folder, job.output))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_defaults_are_those_of_the_library():
    ours, stage = Settings(), mask_stage
    assert (ours.mask_tokens, ours.warm_start) == (stage.MASK_TOKENS, stage.WARM_START)
    assert (ours.recover_tokens, ours.continue_tokens) == (
        sheared.RECOVER_TOKENS,
        sheared.CONTINUE_TOKENS,
    )
    assert (ours.start, ours.ramp) == (masks.START, rates.RAMP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 12}, r"target: heads: got 12, the model has 8"),
        ({"heads": 3}, r"can be 1, 2, 4, 8"),
        ({"heads": None, "ffn": None}, "removes nothing"),
        ({"hidden": 32, "baselines": ("scratch", "taught")}, "not hidden"),
        ({"baselines": ("taugt",)}, "did you mean 'taught'"),
        ({"baselines": ("taught",), "recover_tokens": 0}, "valid are 'scratch' and 'structured'"),
        ({"loading": "clamp"}, "did you mean 'clamped'"),
        ({"warm_start": "tailor"}, "did you mean 'taylor'"),
        ({"mask_tokens": 100}, r"mask_tokens: got 100, one step takes 256"),
        ({"length": 4}, "length: got 4"),
        ({"ramp": 2.0}, "ramp: got 2.0"),
        ({"domains": ("nowhere.txt",)}, "nowhere.txt does not exist"),
        ({"length": 2048}, r"domain 'prose' has [\d,]+ tokens; windows of 2048 need"),
    ],
)
def test_bad_settings_are_one_clear_error(tmp_path, texts, source, change, message):
    settings = {**SMALL, "domains": texts, "mask_tokens": 4096} | change
    with pytest.raises(ValueError, match=message):
        run(Settings(model=source, output=tmp_path / "out", **settings))
    assert not any(tmp_path.iterdir())


def test_domains_that_cannot_be_are_named(texts, tmp_path):
    (tmp_path / "prose.txt").write_text("other")
    tokenizer = effattn.embedded.tokenizer()
    with pytest.raises(ValueError, match="two are called 'prose'"):
        domain_text(tokenizer, train=10, evaluation=10, domains=[texts[0], tmp_path / "prose.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*empty has no"):
        shear_data._files(tmp_path / "empty")


def test_the_command_line_refuses_in_one_line_and_the_recipe_is_the_command(tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("x")
    done = CliRunner().invoke(app, ["shear", "--heads", "4", "--output", str(used)])
    assert done.exit_code == 2
    assert "is not an empty folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    script = Path(__file__).parents[2] / "recipes" / "shear.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--mask-tokens" in done.stdout
