"""What comes after the work of every recipe that saves: the card with its command, and the hub."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import huggingface_hub
import pytest
import typer
from flows import FLOWS, module_of, run_small, save_small
from huggingface_hub import ModelCard
from test_flows import commands

from effattn.recipes import options, publishing
from effattn.recipes.cli import app

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
