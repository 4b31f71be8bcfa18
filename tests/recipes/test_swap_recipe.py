"""Streaming a text through a cache, and `recipes/swap_backend.py` as users run it: what it measures
is what it says, the saved checkpoint computes the same, and every way to get it wrong is one line
with nothing written."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast
from typer.testing import CliRunner

import effattn
from effattn.evaluate.loss import token_losses
from effattn.evaluate.streaming import cache_bytes, stream_losses
from effattn.recipes import swap_backend as jobs
from effattn.recipes.cli import app
from effattn.stages import Quiet
from effattn.swapping import measure
from effattn.swapping.patterns import label_of, parse_pattern, without_sinks
from effattn.swapping.report import SwapReport

ROOT = Path(__file__).parents[2]
SINKS = "sliding(window=16, sinks=2)"
# numbers that a tiny model's cache holds a token: layers, k and v, heads, head size
TOKEN = 2 * 2 * 8 * 8


# ---- streaming
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_a_dense_stream_is_one_window(chunk, tokens):
    model, text = tiny("llama"), tokens[:120]
    losses, held = stream_losses(model, text, chunk)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_losses(model, text, 120), atol=1e-6, rtol=1e-6)
    ends = [*range(chunk, 119, chunk), 119]
    assert held == [8 * TOKEN * end for end in ends]  # fp64


@pytest.mark.parametrize("chunk", [1, 5, 16, 50, 400])
@pytest.mark.parametrize("pattern", [SINKS, "sliding(window=9)", {"0": "dense", "1": SINKS}])
def test_chunks_are_one_forward_and_hold_what_the_window_needs(pattern, chunk, tokens):
    model, text = effattn.swap(tiny("llama"), pattern), tokens[:151]
    losses, held = stream_losses(model, text, chunk)
    torch.testing.assert_close(losses, token_losses(model, text, 150), atol=1e-5, rtol=1e-5)
    if not isinstance(pattern, dict):
        window, sinks = (16, 2) if "sinks" in pattern else (9, 0)
        # 16 more for rollback; where sinks are; of steps of one token, where each place's token is
        steps = 2 * 8 * 2 * (window + 16) if chunk == 1 else 0
        assert max(held) <= 8 * TOKEN * (window + sinks + 16) + 2 * 8 * sinks + steps
        settled = [size for number, size in enumerate(held) if (number + 1) * chunk > 64]
        assert len(set(settled)) == 1


def test_a_cache_with_a_past_goes_on_from_there(tokens):
    model, seen = tiny("llama"), []
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[None, :40], past_key_values=cache)
    losses, held = stream_losses(
        model, tokens[40:100], 16, cache, lambda done, total: seen.append((done, total))
    )
    torch.testing.assert_close(
        losses, token_losses(model, tokens[:100], 99)[40:], atol=1e-6, rtol=1e-6
    )
    assert held[-1] == 8 * TOKEN * 99
    assert seen == [(16, 59), (32, 59), (48, 59), (59, 59)]


def test_cache_bytes_are_those_of_whole_storages_once():
    big = torch.zeros(1000)
    holder = type("Holder", (), {})()
    holder.own, holder.views, holder.again = torch.zeros(10), [big[:3], {"x": big[500:]}], holder
    holder.module = torch.nn.Linear(50, 50)  # a backend is no part of a cache
    assert cache_bytes(holder) == 4 * (1000 + 10)
    slotted = type("Slotted", (), {"__slots__": ("k",)})()
    slotted.k = torch.zeros(7)
    assert cache_bytes([slotted]) == 28


def test_streams_refuse_what_means_nothing(tokens):
    model = tiny("llama")
    with pytest.raises(ValueError, match="chunk: got 0"):
        stream_losses(model, tokens, 0)
    with pytest.raises(ValueError, match="valid is an int64 tensor"):
        stream_losses(model, tokens.float())


def test_training_mode_comes_back(tokens):
    model = tiny("llama").train()
    stream_losses(model, tokens[:9], 4)
    assert model.training


def test_the_embedded_model_streams_with_sinks_and_not_without_a_window():
    """512 tokens were trained: dense falls apart behind them, a window with sinks does not."""
    model, _ = effattn.embedded.load()
    text = effattn.embedded.tokens("validation", 1025)
    best = token_losses(model, text, 512, 256)[512:].mean()
    dense = stream_losses(model, text, 256)[0][512:].mean()
    effattn.swap(model, "sliding", window=256, sinks=4)
    ours, held = stream_losses(model, text, 256)
    assert dense > best + 1
    assert ours[512:].mean() < best + 0.25
    assert held[-1] == held[1] == (256 + 16 + 4) * 8192 + 4 * 8 * 4


# ---- measurements
# -------------------------------------------------------------------------------------------------


def test_every_context_scores_the_same_tokens(tokens):
    model = tiny("llama")
    rows = measure.by_context(model, tokens, [2, 5, 64], 30)
    assert [(row["context"], row["tokens"]) for row in rows] == [(2, 30), (5, 30), (64, 30)]
    assert measure.context_tokens([2, 5, 64], 30) == 95
    losses = []
    for start in range(64, 94, 2):  # context 5: windows overlap by 3 and score 2
        window = tokens[start - 3 : start + 3]
        losses += token_losses(model, window, 5)[3:]
    assert rows[1]["cross_entropy"] == pytest.approx(
        torch.stack(losses).double().mean().item(), abs=1e-6
    )
    assert measure.by_context(model, tokens, [], 30) == []


def test_buckets_cover_everything_once():
    losses = torch.arange(10.0)
    assert [(one["first"], one["last"]) for one in measure.buckets(losses, 4)] == [
        (0, 4),
        (4, 8),
        (8, 10),
    ]
    assert [(one["first"], one["last"]) for one in measure.buckets(losses[:9], 4)] == [
        (0, 4),
        (4, 9),
    ]
    assert measure.buckets(losses[:3], 4)[0]["cross_entropy"] == 1
    assert [one["last"] for one in measure.spans(losses, [0, 5, 10, 20])] == [5, 10]
    assert measure.scores(torch.tensor([1e4]))["perplexity"] == float("inf")
    assert str(measure.scores(torch.tensor([float("nan")]))["perplexity"]) == "nan"


def test_patterns_are_read_and_their_sinks_taken_away():
    assert parse_pattern("sliding( window=8,sinks=1 )") == "sliding(window=8, sinks=1)"
    assert parse_pattern('{"0-1": "dense", "2-": "sliding(window=8)"}') == {
        "0-1": "dense",
        "2-": "sliding(window=8)",
    }
    assert without_sinks("sliding(window=8, sinks=1)") == "sliding(window=8)"
    assert without_sinks({"0": "dense", "1": SINKS}) == {"0": "dense", "1": "sliding(window=16)"}
    assert without_sinks("sliding(window=8)") is None
    assert without_sinks("dense") is None
    assert label_of({"0": "dense", "1-": SINKS}) == f"layers 0: dense; layers 1-: {SINKS}"


# ---- the recipe
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    """A tiny checkpoint with a tokenizer of bytes, on disk."""
    folder = tmp_path_factory.mktemp("parent")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=257, special_tokens=["<e>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([""], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>").save_pretrained(folder)
    tiny("llama", dtype=torch.float32, vocab_size=257).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text(Path(__file__).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return file


FAST = {
    "--contexts": "16,32",
    "--evaluation-tokens": 40,
    "--stream-tokens": 400,
    "--dense-stream-tokens": 200,
    "--chunk": 32,
    "--prompt-tokens": 120,
    "--generate-tokens": 20,
}


def invoke(arguments: dict, *more) -> tuple[int, str]:
    given = [str(part) for pair in arguments.items() for part in pair]
    result = CliRunner().invoke(app, ["swap", *given, *map(str, more)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_recipe_end_to_end(parent, text, tmp_path):
    """A real process; the report says what was measured, and the checkpoint computes what the
    swapped model does.
    """
    out = tmp_path / "out"
    arguments = {"--model": parent, "--text": text, "--pattern": SINKS, "--output": out, **FAST}
    command = [
        sys.executable,
        ROOT / "recipes" / "swap_backend.py",
        *(part for pair in arguments.items() for part in pair),
    ]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Streaming 400 tokens: {SINKS}" in " ".join(done.stdout.split())
    assert str(out / "report.html") in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no temporary folders stay

    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["patterns"] == [SINKS]
    assert report["settings"]["text"] == str(text)
    assert {"device", "torch", "transformers", "threads", "date"} <= set(report["environment"])
    before, ours, bare = report["runs"]
    assert [run["label"] for run in report["runs"]] == [
        "dense (before)",
        SINKS,
        "sliding(window=16)",
    ]
    assert [run["role"] for run in report["runs"]] == ["before", "pattern", "baseline"]
    assert (before["stream"]["tokens"], ours["stream"]["tokens"], bare["stream"]["tokens"]) == (
        200,
        400,
        400,
    )
    assert before["stream"]["cache_bytes"][-1] == [200, 4 * TOKEN * 200]
    assert ours["stream"]["cache_bytes"][-1] == [400, 4 * TOKEN * (16 + 2 + 16) + 2 * 8 * 2]
    assert [(span["first"], span["last"]) for span in ours["stream"]["spans"]] == [
        (0, 128),
        (128, 200),
        (200, 400),
    ]
    assert [(span["first"], span["last"]) for span in before["stream"]["spans"]] == [
        (0, 128),
        (128, 200),
    ]
    assert [row["context"] for row in ours["contexts"]] == [16, 32]
    assert ours["layers"] == [SINKS] * 2
    assert ours["text"]["tokens"] == 20
    assert ours["text"]["tokens_within"] == 8  # 120 + 8 = 128, the trained length
    assert report["verification"]["max_logit_difference"] == 0

    model = effattn.load(out)
    tokens = AutoTokenizer.from_pretrained(out)(text.read_text(), return_tensors="pt")["input_ids"][
        0
    ]
    expected = effattn.swap(effattn.load(parent), SINKS)
    with torch.no_grad():
        assert torch.equal(model(tokens[None, :200]).logits, expected(tokens[None, :200]).logits)
    losses, _ = stream_losses(model, tokens[:401], 32)
    assert ours["stream"]["spans"][2]["cross_entropy"] == pytest.approx(
        losses[200:].double().mean().item(), abs=1e-5
    )

    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert page.count("<svg") == 3
    assert page.count("<article>") == 2
    assert "past 128 tokens, the trained length" in page
    assert "past 128 tokens, the trained length" in markdown
    assert set(
        re.findall(r"https?://[^\s\"'<>]+", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL))
    ) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(link|img|iframe)\b", page)
    assert page.count("<script>") == 1  # the page's own


def test_layers_several_patterns_and_no_output(parent, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = json.dumps({"0": "dense", "1-": "sliding(window=8)"})
    arguments = {
        "--model": parent,
        "--text": text,
        "--pattern": layers,
        **FAST,
        "--generate-tokens": 0,
        "--contexts": "none",
    }
    code, printed = invoke(arguments, "--pattern", "block(block=16)")
    assert code == 0, printed
    assert "block(block=16)" in printed
    assert "Perplexity by context" not in printed
    assert list(tmp_path.iterdir()) == []


def test_before_is_the_model_s_own_attention_also_of_a_swapped_checkpoint(parent, text, tmp_path):
    folder = effattn.save(
        effattn.swap(effattn.load(parent), "sliding", window=4),
        tmp_path / "swapped",
        AutoTokenizer.from_pretrained(parent),
    )
    small = {
        "text": (text,),
        "contexts": (32,),
        "evaluation_tokens": 40,
        "stream_tokens": 64,
        "generate_tokens": 0,
    }
    found = [
        jobs.run(jobs.Settings(model=str(one), patterns=["dense"], **small))
        for one in (parent, folder)
    ]
    first, second = (report.runs[0]["contexts"][0]["perplexity"] for report in found)
    assert first == second
    assert found[1].runs[1]["layers"] == ["dense"] * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--pattern": "slidding(window=8)"}, r"got 'slidding' \(did you mean 'sliding'\?\)"),
        ({"--pattern": "sliding(windw=8)"}, r"got 'windw' \(did you mean 'window'\?\)"),
        ({"--pattern": "sliding"}, "window must be given"),
        ({"--pattern": '{"0": dense}'}, "is not JSON"),
        ({"--pattern": '{"0": 3}'}, "layers '0' have 3"),
        ({"--pattern": '{"0-5": "dense"}'}, "the model has layers 0 to 1"),
        ({"--pattern": "{}"}, "got an empty dict"),
        (
            {"--stream-tokens": "1M"},
            r"stream_tokens: 1,000,001 tokens are needed, the held-out text has 3,0\d\d",
        ),
        ({"--contexts": "16,4k"}, "contexts and evaluation_tokens: 4,137 tokens are needed"),
        ({"--contexts": "16,1"}, "contexts: got 1, valid is 2 tokens or more"),
        ({"--contexts": "long"}, "contexts: got 'long'"),
        ({"--chunk": 0}, "chunk: got 0, valid is 1 or more"),
        ({"--temperature": -1}, "temperature: got -1"),
        ({"--device": "gpu"}, "device: got 'gpu'"),
        ({"--model": "no/such-model-anywhere"}, "not an existing folder"),
        ({"--text": "none.txt"}, "does not exist"),
        ({"--dataset": "wikitext"}, "valid is one of them"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(changed, message, parent, text, tmp_path):
    arguments = {
        "--model": parent,
        "--text": text,
        "--pattern": SINKS,
        "--output": tmp_path / "out",
        **FAST,
        **changed,
    }
    code, printed = invoke(arguments)
    assert code == 2
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_any_work(parent, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    code, printed = invoke({"--model": parent, "--text": text, "--output": tmp_path / "out"})
    assert code == 2
    assert "exists and is not an empty folder" in printed
    assert "loading" not in printed
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_what_a_model_cannot_take_is_said_before_anything_is_measured(text, parent, tmp_path):
    tiny(
        "opt", dtype=torch.float32, vocab_size=257, ffn_dim=96, word_embed_proj_dim=64
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(parent).save_pretrained(tmp_path)
    code, printed = invoke(
        {"--model": tmp_path, "--text": text, "--pattern": "sliding(window=16)", **FAST}
    )
    assert code == 2
    assert "OPTForCausalLM has 128 learned positions and cannot go further" in printed
    assert "perplexity by context" not in printed


class Stops(Quiet):
    """A Ctrl-C when a stage begins."""

    def __init__(self, stage: str):
        self.name = stage

    def stage(self, text: str):
        if text.startswith(self.name):
            raise KeyboardInterrupt
        return nullcontext(lambda done, total: None)


def small(parent, text, **more) -> jobs.Settings:
    return jobs.Settings(
        model=str(parent),
        text=(text,),
        patterns=[SINKS],
        contexts=(),
        stream_tokens=100,
        chunk=50,
        dense_stream_tokens=60,
        prompt_tokens=9,
        generate_tokens=0,
        **more,
    )


def test_ctrl_c_leaves_what_was_measured(parent, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        SwapReport, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        jobs.run(small(parent, text, output=tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == [".out.partial.json"]
    monkeypatch.setattr("effattn.recipes.flow.Show", lambda: Stops("streaming"))
    code, printed = invoke(
        {"--model": parent, "--text": text, "--pattern": SINKS, "--output": tmp_path / "o", **FAST}
    )
    assert code == 130
    kept = ".o.partial.json"
    assert "stopped; 1 finished parts are kept in" in printed
    assert kept in printed
    assert sorted(one.name for one in tmp_path.iterdir()) == [kept, ".out.partial.json"]


def test_what_was_measured_before_a_kill_is_gone_on_from(parent, text, tmp_path):
    asked = small(parent, text, output=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        jobs.run(asked, Stops("the reference"))
    done = json.loads((tmp_path / ".out.partial.json").read_text())["parts"]
    assert {name.rpartition("/")[2] for name in done} == {"contexts", "stream"}
    with pytest.raises(ValueError, match=r"of a run with other settings \(chunk\)"):
        jobs.run(dataclasses.replace(asked, chunk=25))

    class Counts(Quiet):
        steps: ClassVar = []

        def stage(self, text):
            return nullcontext(lambda done, total: self.steps.append(text))

    report = jobs.run(asked, Counts())
    assert {text.partition(":")[0] for text in Counts.steps} == {"the reference"}
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    whole = jobs.run(dataclasses.replace(asked, output=None))
    for resumed, new in zip(report.runs, whole.runs, strict=True):
        ours, theirs = (dict(run["stream"], seconds=0) for run in (resumed, new))
        assert ours == theirs


def test_a_checkpoint_that_reloads_differently_is_not_delivered(
    parent, text, tmp_path, monkeypatch
):
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def tampered(self, folder, *args, **kwargs):
        self.lm_head.weight.data.add_(1e-2)
        save(self, folder, *args, **kwargs)
        self.lm_head.weight.data.sub_(1e-2)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", tampered)
    with pytest.raises(RuntimeError, match="gives other logits"):
        jobs.run(small(parent, text, output=tmp_path / "out"))
    assert [one.name for one in tmp_path.iterdir()] == [".out.partial.json"]


# ---- the report
# -------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened_and_shows_text_as_it_is(parent, text):
    report = jobs.run(small(parent, text))
    main, fresh = report.main["stream"], report.data["reference"]
    for found, perplexity in ((main, 30.0), (fresh, 10.0)):
        for span in found["spans"]:
            span |= {
                "perplexity": perplexity,
                "cross_entropy": torch.tensor(perplexity).log().item(),
            }
    # 100 tokens are within the trained length
    assert f"{SINKS} is at perplexity 30.00 (10.00 for" in report.headline
    report.data["model"]["trained_length"] = 60
    assert f"{SINKS} rises to perplexity 30.00 past token 60 (10.00 for" in report.headline
    fresh["spans"][1]["cross_entropy"] = main["spans"][1]["cross_entropy"]
    assert "stays at perplexity 30.00" in report.headline
    assert "holds 34.0 KiB of cache; dense (before) is at" in report.headline

    bad = "</pre><b>bold</b> ``` | \n"
    for run in report.runs:
        run["text"] = {"tokens": 3, "within": bad, "past": bad, "seconds": 1.0}
    page, markdown = report.to_html(), report.to_markdown()
    assert "<b>" not in page
    assert "&lt;/pre&gt;&lt;b&gt;bold" in page
    assert f"\n````text\n{report.data['prompt']['text']}{bad}\n----- past 60 tokens" in markdown
    main["spans"][1] |= {"perplexity": float("nan"), "cross_entropy": float("nan")}
    again = SwapReport(json.loads(report.to_json()))
    assert "perplexity not finite past token 60" in again.headline
    assert "not finite" in again.to_markdown()
    with pytest.raises(ValueError, match="'other'"):
        SwapReport({"kind": "other"})


def test_save_and_load(parent, text, tmp_path):
    report = jobs.run(small(parent, text))
    report.save(tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert json.loads(SwapReport.load(tmp_path / "report").to_json()) == json.loads(
        report.to_json()
    )
