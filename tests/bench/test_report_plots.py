"""Plots of committed reports, between the marks of a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import plots

PAGE = Path("docs") / "recipes" / "x.md"
MARK = "a\n<!-- plot:here/extend_context_tuned/1 -->\n{}<!-- /plot -->\nb\n"


@pytest.fixture
def root(tmp_path):
    def row(name: str, *losses: float) -> dict:
        points = [
            {
                "tokens": 100 * place,
                "lengths": [{"length": n, "cross_entropy": loss} for n in (32, 128)],
            }
            for place, loss in enumerate(losses)
        ]
        return {"name": name, "target": 128, "curve": points}

    tuned = {"rules": [row("none", 4.0, 3.0), row("pi", 5.0, 2.0)], "reach": []}
    file = tmp_path / "results" / "here" / "extend_context_tuned.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"tuned": tuned}))
    return tmp_path


def test_a_plot_stands_between_its_marks_and_making_it_twice_changes_nothing(root):
    text, figures = plots.update(MARK.format(""), root, PAGE)
    ((path, svg),) = figures.items()
    assert path == Path("docs/figures/here-extend_context_tuned-1.svg")
    assert svg.startswith("<svg")
    assert "<!-- data: " in svg
    assert "](../figures/here-extend_context_tuned-1.svg)\n<!-- /plot -->" in text
    assert "Tuned to 128: loss in windows of 32" in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
    again, drawn = plots.update(text, root, PAGE)
    assert again == text
    assert drawn.keys() == figures.keys()


def test_marks_that_are_none_are_refused(root):
    with pytest.raises(ValueError, match="did you mean 'extend_context_tuned'"):
        plots.update(MARK.format("").replace("_tuned/", "_tune/"), root, PAGE)
    with pytest.raises(ValueError, match="a marker is not"):
        plots.update("<!-- plot:here/extend_context_tuned/1 -->", root, PAGE)
    assert plots.update("nothing", root, PAGE) == ("nothing", {})
