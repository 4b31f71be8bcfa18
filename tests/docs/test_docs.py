"""The front page and the documentation: short, true to the commands, and code that runs."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from effattn.recipes.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for name, code in found if name == language]


def run(*command: str | Path, folder: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.quick
def test_the_front_page_is_one_screen():
    assert (ROOT / "README.md").stat().st_size <= 12 * 1024


@pytest.mark.quick
def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"[\w/-]+\.md", str(nav))
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.quick
@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_somewhere(page):
    """Files only; mkdocs checks the places in them."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.quick
@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_on_a_page_is_python(page):
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.mark.quick
@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_on_a_page_exist_with_their_options(page):
    """`effattn COMMAND --option` and `python recipes/FILE.py`, wherever a page shows them."""
    for code in blocks(page, "console"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ ").partition("   #")[0].replace("…", ""))
            if line.startswith("$ effattn"):
                options = command(app, [word for word in words[1:] if word[0] != "-"])
                asked = [word for word in words if word.startswith("--")]
                assert set(asked) <= options, f"{line}: {set(asked) - options}"
            for word in words:
                if word.startswith("recipes/"):
                    assert (ROOT / word).is_file(), line


def command(group: typer.Typer, words: list[str]) -> set[str]:
    """The options of the command that the words begin with."""
    found = typer.main.get_command(group)
    while hasattr(found, "commands"):
        assert words[0] in found.commands, f"no command {words[0]!r}"
        found, words = found.commands[words[0]], words[1:]
    return {name for p in found.params for name in (*p.opts, *p.secondary_opts)}


@pytest.mark.example
def test_the_front_page_runs(tmp_path):
    """The Python of the README, on the embedded model, on less text so that it stays quick."""
    (code,) = blocks(ROOT / "README.md", "python")
    code = code.replace("50_000", "5_000").replace("16_384", "2_048")
    (tmp_path / "readme.py").write_text(code, encoding="utf-8")
    out = run("readme.py", folder=tmp_path)
    assert "KV bytes per token" in out
    assert (tmp_path / "runs" / "gqa2" / "config.json").is_file()


@pytest.mark.example
@pytest.mark.parametrize(
    "script",
    EXAMPLES,
    ids=lambda script: script.stem,
)
def test_every_example_runs(script, tmp_path, monkeypatch, capsys):
    """In this process, which has loaded torch and transformers already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])  # what it writes goes there
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    page = DOCS / "examples" / f"{script.stem.replace('_', '-')}.md"
    shown = blocks(page, "text")[0]
    # the page shows what the script prints: the words are the same, the numbers need not be
    assert [words(line) for line in out.splitlines()][-1:] == [words(shown.splitlines()[-1])]


def words(line: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", line)
