"""What every recipe is made of: options from fields, and what the command does with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from effattn.recipes import flow, options
from effattn.recipes.console import Show
from effattn.recipes.options import contexts, names, option, or_none, several, tokens, whole

pytestmark = pytest.mark.quick


@dataclass
class Settings(options.Settings):
    """Does nothing to a model."""

    heads: int = whole(help="to keep", least=1)
    to: int = option(help="a length", read=lambda name, text: int(text.removesuffix("k")) * 1024)
    output: Path | None = option(None, "where")
    patterns: Sequence[str] = several(("dense",), "a spec; repeat for more", name="--pattern")
    text: Sequence[Path] = options.text_files("to read")
    methods: Sequence[str] = names(("a", "b"), "to compare")
    spec: str | None = or_none("dense", "a spec, or none")
    share: float | None = option(
        None, "a share", read=lambda name, text: text and float(text) / 100
    )
    train_tokens: int = tokens(50_000, "to train on", least=1)
    lengths: Sequence[int] = contexts((512, 4096), "windows")
    bias: bool = option(False, "with a bias", name="--bias")
    every: InitVar[bool] = option(False, "all methods")
    overrides: dict = field(default_factory=dict)

    def __post_init__(self, every: bool) -> None:
        super().__post_init__()
        if every:
            self.methods = ("a", "b", "c")

    def stopped(self) -> str:
        return f"stopped with {self.heads}"


def called(*arguments: str, run=None):
    """(exit code, what was printed, the settings that the run got)."""
    got = []

    def take(settings, show):
        got.append(settings)
        return run(show) if run else "done"

    app = typer.Typer()
    app.command()(flow.command(Settings, take))
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output, got[0] if got else None


NEEDED = ("--heads", "2", "--to", "4k")


def test_defaults_are_those_of_the_fields():
    code, printed, got = called(*NEEDED)
    assert code == 0, printed
    assert printed.strip() == "done"
    assert got == Settings(heads=2, to=4096)
    assert "every" not in {one.name for one in fields(got)}


def test_every_kind_of_option(tmp_path):
    code, printed, got = called(
        *NEEDED,
        *(
            "--pattern",
            "x",
            "--pattern",
            "y",
            "--text",
            "t.txt",
            "--methods",
            "c, d,",
            "--methods",
            "e",
        ),
        *("--spec", "none", "--share", "25", "--train-tokens", "1.5M", "--lengths", "none"),
        *("--bias", "--every", "--output", str(tmp_path)),
    )
    assert code == 0, printed
    assert got.patterns == ("x", "y")
    assert got.text == (Path("t.txt"),)
    assert got.methods == ("a", "b", "c")
    assert (got.spec, got.share, got.train_tokens, got.lengths) == (None, 0.25, 1_500_000, ())
    assert got.bias
    assert f"checkpoint  {tmp_path}" in printed
    assert str(tmp_path / "report.html") in printed


def test_names_that_are_given_twice_are_all_asked_for():
    code, printed, got = called(*NEEDED, "--methods", "c, d,", "--methods", "e")
    assert code == 0, printed
    assert got.methods == ("c", "d", "e")


def test_help_says_what_the_fields_say(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    _, printed, _ = called("--help")
    for said in ("Does nothing to a model.", "512,4k", "50000", "TOKENS", "a,b", "--pattern"):
        assert said in printed
    for hidden in ("--overrides", "--no-bias", "--patterns"):
        assert hidden not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--heads", "0", "--to", "4k"), "error: heads: got 0, valid is 1 or more"),
        ((*NEEDED, "--lengths", "4x"), "error: lengths: got '4x', valid is like"),
        ((*NEEDED, "--train-tokens", "ten"), "valid is like 50000"),
        (("--heads", "2"), "Missing option '--to'"),
    ],
)
def test_bad_values_are_said(arguments, said):
    code, printed, got = called(*arguments)
    assert code == 2
    assert said in printed
    assert got is None


def test_a_stopped_run_says_what_is_kept():
    def stop(show):
        raise KeyboardInterrupt

    code, printed, _ = called(*NEEDED, run=stop)
    assert code == 130
    assert "stopped with 2" in printed


def test_the_main_process_alone_says_something(monkeypatch):
    monkeypatch.setenv("RANK", "1")

    def show_nothing(show):
        with show.stage("working") as progress:
            progress(1, 2)
        return "done"

    code, printed, _ = called(*NEEDED, run=show_nothing)
    assert code == 0
    assert printed == ""


def test_without_a_terminal_quarters_are_lines(capsys, monkeypatch):
    now = iter([0.0, 20.0, 60.0, 120.0, 180.0, 0.0, 1.0, 0.0, 0.1, 10.0])
    monkeypatch.setattr("effattn.recipes.console.monotonic", lambda: next(now))
    with Show().stage("measuring") as progress:
        for done in range(1, 13):
            progress(done, 12)
    with Show().stage("quick") as progress:  # told only that it begins
        progress(3, 4)
    with Show().stage("as quick as it began") as progress:
        progress(0, 100)
        progress(1, 100)
        progress(60, 100)
    assert capsys.readouterr().err.splitlines() == [
        "measuring ...",
        "measuring: about 3:40 left, by the first 8.3 %",
        "measuring: 25 % after 1:00, about 3:00 left",
        "measuring: 50 % after 2:00, about 2:00 left",
        "measuring: 75 % after 3:00, about 1:00 left",
        "quick ...",
        "as quick as it began ...",
        "as quick as it began: 50 % after 0:10, about 0:07 left",
    ]


def test_an_estimate_waits_for_more_than_a_warm_up(capsys, monkeypatch):
    now = iter([0.0, 0.5, 4.0, 6.0])
    monkeypatch.setattr("effattn.recipes.console.monotonic", lambda: next(now))
    with Show().stage("training") as progress:
        for done in (1, 300, 500, 501):
            progress(done, 50_000)
    assert capsys.readouterr().err.splitlines() == [
        "training ...",
        "training: about 9:54 left, by the first 1 %",
    ]


def test_what_two_runs_have_in_common():
    kept = Settings(heads=2, to=4096, output=Path("here"), overrides={"bf16": True}).kept()
    assert not {"output", "overrides", "device"} & set(kept)
    assert kept["heads"] == 2


FREES = """
from effattn.recipes.console import quiet_libraries
quiet_libraries()
import torch
from effattn.profiling.memory import PeakMemory
old = [torch.ones(1000) for _ in range(3000)]
with PeakMemory("cpu"):
    torch.ones(10)
    del old
"""


def test_measuring_memory_makes_no_library_talk():
    """torch warns of blocks that are older than the measurement, which nobody can change."""
    done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
