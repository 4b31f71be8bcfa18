"""What comes after the work of every recipe that saves: the card with its command, and the hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import typer
from flows import FLOWS, module_of, run_small, save_small
from huggingface_hub import ModelCard
from report_pages import PAGES
from test_flows import commands

import effattn
from effattn.recipes import flow, layerwise, options, publishing
from effattn.recipes.cli import app
from effattn.reports.common import HARNESS
from effattn.reports.document import Document
from effattn.stages import Quiet

SAVING = [name for name in FLOWS if issubclass(module_of(name).Settings, options.Saving)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("publishing")
    save_small(root)
    return root


@pytest.fixture
def hub(monkeypatch):
    """The hub as it is here: what is sent there is noted."""
    sent = []

    class Api:
        def create_repo(self, name, **how):
            sent.append(("create", name, how))
            return SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            files = sorted(file.name for file in folder_path.iterdir())
            sent.append(("upload", repo_id, files, commit_message))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return sent


def test_every_recipe_that_saves_a_checkpoint_has_them():
    assert set(SAVING) == {
        name for name, flow in FLOWS.items() if flow.command and flow.saves and name != "export"
    }
    for name in SAVING:
        assert FLOWS[name].command == module_of(name).Settings.COMMAND


# ---- the command


def read_back(settings) -> options.Saving:
    program, *words = shlex.split(publishing.command_line(settings))
    assert program == "effattn"
    names = settings.COMMAND.split()
    assert words[: len(names)] == names
    command = commands(typer.main.get_command(app))[settings.COMMAND]
    given = command.make_context("x", words[len(names) :]).params
    return type(settings).from_options(given)


@pytest.mark.parametrize("name", SAVING)
def test_the_command_gives_the_same_settings(name, tmp_path):
    flow, cls = FLOWS[name], module_of(name).Settings
    given = flow.needs | (flow.small or {}) | {"model": "owner/a b"} | {"output": "out dir"}
    given.pop("overrides", None)
    settings = cls(**given)
    again = read_back(settings)
    for one in options.declared(cls):
        if hasattr(settings, one.name):
            ours, theirs = getattr(settings, one.name), getattr(again, one.name)
            assert str(ours) == str(theirs), one.name


def test_every_kind_of_option_is_written_as_it_is_read():
    cls = module_of("convert_gqa").Settings
    settings = cls(
        kv_heads=2,
        output="/home/me/runs/out",
        refit=False,
        bos=False,
        lr=1e-4,
        text=("/secret/a'b.txt", "c.txt"),
        decode_contexts=(),
        push_to_hub="me/x",
    )
    told = publishing.command_line(settings)
    assert told == (
        "effattn convert-gqa --kv-heads 2 --output out --no-refit --text 'a'\"'\"'b.txt' "
        "--text c.txt --no-bos --lr 0.0001 --decode-contexts none"
    )
    cls = module_of("swap_backend").Settings
    by_layer = {"0": "dense", "1-": "sliding(window=8)"}
    told = publishing.command_line(cls(patterns=(by_layer, "dense")))
    assert json.loads(shlex.split(told)[3]) == by_layer
    assert told.endswith("--pattern dense")


# ---- the card


def test_no_card_where_no_checkpoint_is_and_nothing_is_sent(small, tmp_path, hub):
    how = {"formats": ("int8(group=16, residual=16)", "int4(group=16, residual=16)")}
    run_small("quantize_kv", str(small / "model"), small / "text.txt", tmp_path / "out", **how)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "report.md", "report.html"}
    assert hub == []


# ---- lm-evaluation-harness


@pytest.fixture
def judge(monkeypatch):
    """The harness as it is here: what it is asked is noted, and then it may stop."""
    asked = []

    def scores(model, tokenizer, tasks, *, limit, length, progress):
        asked.append((tuple(tasks), model.config.num_key_value_heads, limit, length))
        if len(asked) == judge.stops:
            raise KeyboardInterrupt
        return {tasks[0]: {"metrics": {"acc": len(asked) / 8}, "errors": {}, "samples": limit}}

    judge = SimpleNamespace(asked=asked, stops=None)
    monkeypatch.setattr("effattn.evaluate.harness_runs.check_harness", lambda tasks: None)
    monkeypatch.setattr("effattn.evaluate.harness_runs.harness_scores", scores)
    monkeypatch.setattr("effattn.profiling.environment.package_version", lambda name: "1")
    return judge


def test_both_models_are_judged_and_a_stopped_run_goes_on(small, tmp_path, judge, monkeypatch):
    monkeypatch.setattr("effattn.hf.verify.verify_plain", lambda *given: {"fresh_process": True})
    out, model, text = tmp_path / "out", str(small / "model"), small / "text.txt"
    how = {"lm_eval": ("one", "two"), "lm_eval_limit": 3, "kv_heads": 1, "uptrain_tokens": 0}
    judge.stops = 4
    with pytest.raises(KeyboardInterrupt):
        run_small("convert_gqa", model, text, out, **how)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"out", ".out.partial", ".out.lm-eval.json"}
    weights = (out / "model.safetensors").stat()
    kept = json.loads((tmp_path / ".out.lm-eval.json").read_text())["parts"]
    of_parent = [one for one in kept if publishing.fingerprint(small / "model") in one]
    assert len(of_parent) == 2, "of another parent in that folder it would be nothing"
    judge.stops = None
    report = run_small("convert_gqa", model, text, out, **how)
    assert (out / "model.safetensors").stat() == weights
    heads = [8, 8, 1, 1, 1]  # of the parent twice, of the result once before it was stopped
    assert [of for _, of, _, _ in judge.asked] == heads
    assert [tasks[0] for tasks, *_ in judge.asked] == ["one", "two", "one", "two", "two"]
    assert {(limit, length) for *_, limit, length in judge.asked} == {(3, judge.asked[0][3])}
    found = report.data["lm_eval"]
    assert found["before"]["two"]["metrics"] == {"acc": 2 / 8}
    assert found["after"]["one"]["metrics"] == {"acc": 3 / 8}
    assert found["after"]["two"]["metrics"] == {"acc": 5 / 8}
    row = "| one | acc | 3 | 0.1250 | 0.3750 | +0.2500 |"
    assert row in (out / "report.md").read_text()
    assert row in (out / "README.md").read_text()
    assert "+0.2500" in (out / "report.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "nothing stays"


def test_what_keeps_nothing_else_keeps_its_output(small, tmp_path, judge, monkeypatch):
    """A re-hosting has nothing to go on from but its output, which is there before it is judged."""
    monkeypatch.setattr("effattn.hf.verify.verify_plain", lambda *given: {"fresh_process": True})
    given = ("rehost", str(small / "model"), small / "text.txt", tmp_path / "out")
    how = {"lm_eval": ("one",)}
    judge.stops = 1
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_small(*given, **how)
    assert "is complete without lm-evaluation-harness" in stopped.value.__notes__[0]
    out = tmp_path / "out"
    assert {"config.json", "README.md", "report.json", publishing.WAITS} <= set(os.listdir(out))
    effattn.load(out)
    weights = (out / "model.safetensors").stat()

    # other settings are another run's
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        run_small(*given, **how, length=16)

    def fails(*given, **how):
        raise ConnectionError("no route\nto host")

    with monkeypatch.context() as patch:
        patch.setattr("effattn.evaluate.harness_runs.harness_scores", fails)
        with pytest.raises(RuntimeError, match=r"^lm_eval: no route; .*the same command goes on$"):
            run_small(*given, **how)

    report = run_small(*given, **how)
    assert report.data["lm_eval"]["after"]["one"]["samples"] is None
    assert "| one | acc |" in (out / "README.md").read_text()
    assert (out / "model.safetensors").stat() == weights
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not (out / publishing.WAITS).exists()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        run_small(*given, **how)


def test_who_asks_no_longer_is_not_kept_waiting(small, tmp_path, judge, monkeypatch):
    monkeypatch.setattr("effattn.hf.verify.verify_plain", lambda *given: {"fresh_process": True})
    given = ("rehost", str(small / "model"), small / "text.txt", tmp_path / "out")
    judge.stops = 2
    with pytest.raises(KeyboardInterrupt):
        run_small(*given, lm_eval=("one",))
    report = run_small(*given)
    assert len(judge.asked) == 2
    assert report.data.get("lm_eval") is None
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / publishing.WAITS).exists()


def test_who_asks_when_it_is_sent_again_is_judged(small, tmp_path, judge, hub, monkeypatch):
    """Where sending failed the output is complete, and does not wait for the harness."""
    given = ("convert_latent", str(small / "model"), small / "text.txt", tmp_path / "out")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "upload_folder", None)
        with pytest.raises(RuntimeError, match="did not get all"):
            run_small(*given, push_to_hub="name")
    report = run_small(*given, push_to_hub="name", lm_eval=("one",))
    assert report.data["lm_eval"]["tasks"] == ["one"]
    assert "| one | acc |" in (tmp_path / "out" / "README.md").read_text()
    assert hub[-1][0] == "upload"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", SAVING)
def test_every_recipe_goes_on_with_its_own_report(name, monkeypatch):
    """It hands the class of its report to `output_of`, which judges an output that waits."""
    given = {}

    @contextlib.contextmanager
    def output_of(settings, report=None, show=None, default=None):
        given.update(report=report, show=show)
        yield True

    recipe = module_of(name)
    monkeypatch.setattr(flow, "output_of", output_of)
    with pytest.raises(FileNotFoundError):
        recipe.run(settings_of(name, model="x", output=Path("/nowhere/out")), show=Quiet())
    assert issubclass(given["report"], Document)
    assert isinstance(given["show"], Quiet)


REPORTS = ["prune_oneshot", "conversion", "mla", "swap", "linearize", "shear", "extend"]
# their plots take their time
REPORTS += [
    pytest.param(name, marks=pytest.mark.slow) for name in ("fit", "quantize", "structured")
]


@pytest.mark.parametrize("kind", REPORTS)
def test_every_report_shows_what_was_judged(kind, monkeypatch):
    """On its page, in its Markdown, and on the terminal."""
    told = {"metrics": {"acc": 0.5}, "errors": {}, "samples": 3}
    found = {"before": {"judged": told}, "after": {"judged": told}, "limit": 3, "version": "1"}
    made = []

    def with_it(report) -> None:
        report.data["lm_eval"] = found
        made.append(report)

    monkeypatch.setattr(Document, "__post_init__", with_it)
    assert "judged</t" in PAGES[kind][0]()
    assert "| judged | acc | 3 | 0.5000 | 0.5000 | +0.0000 |" in made[-1].to_markdown()
    assert HARNESS in [table.title for table in made[-1].shown()]


def test_the_harness_is_asked_for_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    given = {"model": "nowhere", "output": tmp_path / "out"}
    for more, message in (
        ({"lm_eval": ("arc_easy",)}, "lm-evaluation-harness is not installed; pip install"),
        ({"lm_eval_limit": 3}, "lm_eval_limit: there are no examples without lm_eval"),
    ):
        with pytest.raises(ValueError, match=message):
            module_of("rehost").run(settings_of("rehost", **given, **more))
    with pytest.raises(ValueError, match="this run saves no checkpoint"):
        module_of("fit").run(settings_of("fit", frontier=True, **given, lm_eval=("a",)))
    from_files = settings_of("convert_gqa", **given, lm_eval=("a",), measure="no")
    with pytest.raises(ValueError, match="lm_eval: got some with measure 'no'"):
        layerwise.check(from_files, "uptrain_tokens")
    assert list(tmp_path.iterdir()) == []


# ---- the hub


def settings_of(name: str, **given):
    cls = module_of(name).Settings
    needs = FLOWS[name].needs | {"output": None} | given
    return cls(**needs)


def test_it_is_sent_when_all_is_done_and_again_where_that_failed(small, tmp_path, hub, monkeypatch):
    out, model, text = tmp_path / "out", str(small / "model"), small / "text.txt"
    upload = huggingface_hub.HfApi.upload_folder

    def fails(self, **how):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fails)
    how = {"push_to_hub": "name", "push_private": True}
    with pytest.raises(RuntimeError, match=r"did not get all .*no route\); .*hf upload name"):
        run_small("convert_latent", model, text, out, **how)
    assert hub == [("create", "name", {"private": True, "exist_ok": True})]
    weights = (out / "model.safetensors").stat()

    # the output is complete: the same command sends it, and does nothing else
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    report = run_small("convert_latent", model, text, out, **how)
    kind, where, files, message = hub[-1]
    assert (kind, where, message) == ("upload", "me/name", "effattn convert-latent")
    assert {"README.md", "config.json", "model.safetensors", "report.json"} <= set(files)
    assert (out / "model.safetensors").stat() == weights
    assert [file.name for file in tmp_path.iterdir()] == ["out"]

    found = ModelCard.load(out / "README.md")
    assert found.data.tags == ["effattn", "convert-latent"]
    assert '.from_pretrained("name")' in found.text
    assert "$ effattn convert-latent --output out --ratio 0.5 --model model " in found.text
    assert "| Perplexity |" in found.text
    assert report.data["environment"]["device"] in found.text
    assert str(small) not in found.text, "where files lie is nobody else's business"


def test_it_can_be_stopped_several_times_while_it_is_sent(small, tmp_path, hub, monkeypatch):
    """The same command sends it, until it is there; who has no same command gets one."""
    upload = huggingface_hub.HfApi.upload_folder

    def stops(self, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", stops)
    given = (str(small / "model"), small / "text.txt", tmp_path / "out")
    how = {"push_to_hub": "name", "push_private": True}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt) as stopped:
            run_small("convert_latent", *given, **how)
        said = f"stopped; name may not have all of it; the output is complete, .*{tmp_path}/out"
        assert re.match(f"{said} --private$", stopped.value.__notes__[0])
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    run_small("convert_latent", *given, **how)
    assert hub[-1][0] == "upload"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_hub_makes_no_other_run():
    assert settings_of("rehost", push_to_hub="a/b").kept() == settings_of("rehost").kept()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"push_to_hub": "a/b/c"}, "push_to_hub: got 'a/b/c', valid is a repository, owner/name"),
        ({"push_to_hub": ""}, "push_to_hub: got '', valid is a repository"),
        ({"push_to_hub": "../x"}, "valid is a repository"),
        ({"push_to_hub": "a/b\nc"}, "valid is a repository"),
        ({"push_private": True}, "push_private: nothing is sent without push_to_hub"),
    ],
)
@pytest.mark.parametrize("name", ["rehost", "prune_oneshot", "convert_gqa"])
def test_bad_names_are_refused_before_any_work(name, given, message, tmp_path, hub):
    with pytest.raises(ValueError, match=message):
        module_of(name).run(settings_of(name, model="nowhere", output=tmp_path / "out", **given))
    assert list(tmp_path.iterdir()) == []
    assert hub == []


def test_who_cannot_send_is_told_before_any_work(tmp_path, hub, monkeypatch):
    def refused(message, name="rehost", **given):
        given = {"model": "nowhere", "output": tmp_path / "out", "push_to_hub": "a/b"} | given
        with pytest.raises(ValueError, match=message):
            module_of(name).run(settings_of(name, **given))

    refused("this run saves no checkpoint", "fit", frontier=True)
    refused("this run saves no checkpoint", "quantize_kv")
    for name in ("swap_backend", "linearize", "shear"):
        refused("this run saves no checkpoint", name, output=None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused("push_to_hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
