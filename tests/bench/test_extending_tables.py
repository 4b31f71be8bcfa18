"""The article's table and those of tuned rules, between the marks of a page."""

from __future__ import annotations

import json

import pytest

from bench import extending

PAGE = "a\n<!-- article -->\n{}<!-- /article -->\nb\n"


def report(**rules: float) -> dict:
    """Rules that are right in so many of the tokens at 4,096, in half of them at 512, and in a
    hundredth less where they repeat."""
    rows = [
        {
            "name": name.replace("_", "-"),
            "natural": [
                {"length": 512, "accuracy": 0.5},
                {"length": 4096, "accuracy": right},
            ],
            "repeated": [{"accuracy": 0.9}, {"accuracy": right - 0.01}],
        }
        for name, right in rules.items()
    ]
    return {
        "kind": "extend_context",
        "rules": rows,
        "settings": {"lengths": [512, 4096]},
        "model": {"trained_length": 512},
    }


@pytest.fixture
def root(tmp_path):
    found = {
        extending.NONE: report(baseline=0.2, rerope_128=0.4),
        extending.HWFA: report(baseline=0.3),
    }
    found[extending.NONE]["rules"] += report(x=0.45)["rules"]
    found[extending.NONE]["rules"][-1]["name"] = "rerope-128 + log-n"
    for name, data in found.items():
        file = tmp_path / "results" / extending.FILES[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data))
    return tmp_path


def test_each_row_of_the_article_stands_beside_what_was_measured(root):
    text = extending.update(PAGE.format("before the table was made\n"), root)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {(line[0], line[1]): line[2:] for line in lines[2:]}
    assert len(rows) == len(extending.ARTICLE) == 36
    assert rows["rerope-128", ""] == ["50.0", "39.0", "40.0", "49.41", "76.11", "47.82"]
    assert rows["rerope-128", "at test time"][:3] == ["50.0", "44.0", "45.0"]
    assert rows["rerope-128", "trained in"][:3] == ["…"] * 3
    assert rows["baseline", "trained in"][:3] == ["…"] * 3
    assert rows["hwfa", "trained in"] == ["50.0", "29.0", "30.0", "48.70", "80.84", "48.15"]
    assert text.count("is not measured yet: `cpu-epyc-avx512-2core/extend_context_logn.json`") == 1
    assert "before the table was made" not in text
    assert extending.update(text, root) == text


def test_a_mark_without_an_end_is_refused(root):
    with pytest.raises(ValueError, match="begins with <!-- article has no end"):
        extending.update("<!-- article -->\n", root)
    with pytest.raises(ValueError, match="begins with <!-- tuned: has no end"):
        extending.update("<!-- tuned:here -->\n", root)
    assert extending.update("nothing", root) == "nothing"


def test_the_tables_of_tuned_rules_are_the_reports(root):
    point = {"lengths": [{"length": n, "cross_entropy": 3.5} for n in (512, 2048)]}
    row = {
        "name": "pi",
        "axes": {"positions": "pi(length=2048)"},
        "target": 2048,
        "learning_rate": 1e-4,
        "curve": [{"tokens": 0, **point}, {"tokens": 99, **point}],
    }
    file = root / "results" / "here" / "extend_context_tuned.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"tuned": {"rules": [row], "reach": []}}))
    text = extending.update("<!-- tuned:here -->\n<!-- /tuned -->\n", root)
    assert "| pi to 2,048: pi(length=2048) | 99 | 3.5000 | 3.5000 | 3.5000 | 3.5000 |" in text
    assert "2,048 tokens: tuned PI has the lowest loss" in text
    assert extending.update(text, root) == text
