"""What is true of every flow, by the table of flows.py: a row for each, the same command from both
sides, its training in every precision.

The same table is run through in test_bounds.py (bad numbers), test_outputs.py (outputs that cannot
be written) and test_kills.py (kills, stops, a full disk, a proof that fails)."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import click
import pytest
import test_precision
import typer
from flows import COMMANDS, FLOWS, KILLED, module_of
from typer.testing import CliRunner

from effattn.recipes import options
from effattn.recipes.cli import app

ROOT = Path(__file__).parents[2]
ABOUT = {"backends", "compare", "kernels"}  # commands that tell something and write no output
MOUNTED = {flow.command: name for name, flow in FLOWS.items() if flow.command}


def commands(group: click.Group, before: str = "") -> dict[str, click.Command]:
    """name, as one types it -> command, of all that are mounted."""
    found = {}
    for name, one in group.commands.items():
        inner = commands(one, f"{before}{name} ") if hasattr(one, "commands") else None
        found |= {before + name: one} if inner is None else inner
    return found


def test_every_command_has_a_row():
    assert set(commands(typer.main.get_command(app))) - ABOUT == set(COMMANDS)


def test_every_recipe_has_a_row():
    declared = {
        file.stem
        for file in (ROOT / "recipes").glob("*.py")
        if re.search(
            r"\n@dataclass\nclass Settings\(options\.(Settings|Saving)\)",
            file.read_text(encoding="utf-8"),
        )
    }
    assert declared == set(FLOWS)


def test_every_command_can_be_killed():
    """In test_kills.py: each has settings of a small run."""
    assert set(MOUNTED.values()) == set(KILLED)


@pytest.mark.parametrize("name", FLOWS)
def test_a_recipe_is_its_settings_a_run_and_a_command(name):
    recipe = module_of(name)
    assert issubclass(recipe.Settings, options.Settings)
    assert recipe.run.__doc__
    assert recipe.command.__doc__.split() == recipe.Settings.__doc__.split()


@pytest.mark.parametrize("command", MOUNTED)
def test_the_script_is_the_command(command, monkeypatch, capsys):
    """`python recipes/x.py` and `effattn x` say the same of themselves."""
    monkeypatch.setenv("COLUMNS", "120")
    script = ROOT / "recipes" / f"{MOUNTED[command]}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    done = CliRunner().invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    printed, mounted = (
        [line.rstrip() for line in text.splitlines() if "Usage:" not in line and line.strip()]
        for text in (capsys.readouterr().out, done.output)
    )
    assert printed == mounted
    assert any("--output" in line for line in printed)


@pytest.mark.parametrize("name", FLOWS)
def test_what_trains_is_tried_in_every_precision(name):
    """Those that take settings of the Trainer; the model that comes with the package is trained
    from nothing, and has no dtype of its own."""
    fields = {field.name for field in dataclasses.fields(module_of(name).Settings)}
    assert bool(FLOWS[name].trains) == ("overrides" in fields and name != "pretrain_embedded")
    assert set(FLOWS[name].trains) <= {one.__name__ for one in test_precision.FLOWS}


def test_every_training_belongs_to_a_flow():
    tried = {one.__name__ for one in test_precision.FLOWS}
    trained = {kind for flow in FLOWS.values() for kind in flow.trains}
    # beside them what Python alone has, and a stage of a comparison that saves no checkpoint
    assert tried == trained | {"Recurrent", "TunedRule"}
