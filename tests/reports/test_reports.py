"""The report module: tables, plots, the page and its policy, JSON and files; nothing measured is
invented or lost.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import re

import pytest

from effattn.reports import figures
from effattn.reports.files import finite, write_all_atomic
from effattn.reports.page import TEMPLATES, Passage, Section, markdown_text, page, render
from effattn.reports.plots import (
    AFTER,
    BEFORE,
    RooflinePoint,
    Series,
    bar_plot,
    line_plot,
    roofline_plot,
    short_count,
    short_si,
    stacked_bar_plot,
)
from effattn.reports.tables import Table, data_size, number, pairs, percent


def texts(svg: str) -> list[str]:
    return [html.unescape(one) for one in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (number(None), "not measured"),
        (number(True), "yes"),
        (number(0.0), "0"),
        (number(1234567), "1,234,567"),
        (number(0.25), "0.2500"),
        (number(1234.56), "1,234.6"),
        (number(1.5e-5), "1.50e-05"),
        (number("x"), "x"),
        (number(math.inf), "inf"),
        (data_size(None), "not measured"),
        (data_size(1023), "1,023 B"),
        (data_size(1536), "1.5 KiB"),
        (data_size(3 << 40), "3.0 TiB"),
        (percent(2.0, 2.1), " (+5.0 %)"),
        (percent(None, 1.0), ""),
        (short_count(1536), "1.5k"),
        (short_count(512), "512"),
        (short_count(3 << 20), "3M"),
        (short_si(14.2e9, "B/s"), "14.2 GB/s"),
        (short_si(2e12), "2T"),
        (short_si(0.5), "0.5"),
    ],
)
def test_numbers_as_a_person_reads_them(made, text):
    assert made == text


def test_pairs_name_what_is_missing():
    table = pairs("Facts", {"a_b": None, "c": 0}, missing="not known")
    assert table.rows == [("a b", "not known"), ("c", "0")]
    assert table.facts


def test_finite_makes_strict_json():
    given = {"a": [1.0, math.nan, {"b": -math.inf}], "c": (2, "x", None)}
    assert finite(given) == {"a": [1.0, None, {"b": None}], "c": [2, "x", None]}
    json.dumps(finite(given), allow_nan=False)


def test_files_appear_together_or_not_at_all(tmp_path):
    write_all_atomic(tmp_path / "a" / "b", {"x.md": "ü", "y.json": "{}"})
    assert (tmp_path / "a" / "b" / "x.md").read_text(encoding="utf-8") == "ü"
    with pytest.raises(TypeError):
        write_all_atomic(tmp_path / "c", {"x.md": "text", "y.json": None})
    assert list((tmp_path / "c").iterdir()) == []


def test_markdown_of_tables_and_passages():
    table = Table("T|", ("a", "b"), [("x|<b>", "1\n2")], "note")
    assert table.markdown() == "**T\\|**\n\n| a | b |\n| --- | ---: |\n| x\\|\\<b> | 1 2 |\n\nnote"
    assert markdown_text("a\\b") == "a\\\\b"
    assert (
        Passage("p", "given ", "```", "end", "rest")
        .markdown()
        .startswith("**p**\n\n````text\ngiven ```\n----- end")
    )


# ---- colours and plots
# -------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_visible_on_light_and_dark():
    cards = re.findall(r"--card: (#\w{6})", (TEMPLATES / "page.css").read_text())
    assert len(cards) == 2
    for color, card in itertools.product([*figures.PALETTE, figures.NEUTRAL], cards):
        assert contrast(color, card) >= 3, (color, card)


def test_no_two_series_look_alike():
    for codes in (figures.MARKERS, figures.HATCHES):  # of 50, more than a person can read
        assert (
            len(
                {
                    (figures.PALETTE[i % len(figures.PALETTE)], codes[i % len(codes)])
                    for i in range(50)
                }
            )
            == 50
        )
    plot = line_plot("t", [Series(f"s{i}", [1, 2], [i, i + 1], AFTER) for i in range(3)], "x", "y")
    drawn = re.findall(r'<path d="[^"]*"[^>]*style="([^"]*1a7dc0[^"]*)"', plot)
    assert len({style for style in drawn if "fill: none" in style}) == 3  # dashes differ
    bars = stacked_bar_plot("t", ["g"], [(f"p{i}", AFTER, [1]) for i in range(3)], "x", "y")
    assert len(set(re.findall(r"fill: (url\(#\w+\)|#1a7dc0)", bars))) == 3  # hatching differs


def test_plots_are_text_that_follows_the_page():
    plot = line_plot(
        "A <title>",
        [Series("a $x$", [512, 1024], [1, None], AFTER), Series("b", [512], [2], BEFORE)],
        "context (tokens)",
        "time (ms)",
        contexts=True,
        log_y=True,
        mark=(600, "here"),
    )
    assert 'role="img"' in plot
    label = 'aria-label="A &lt;title&gt;: time (ms) against context (tokens), a $x$, b"'
    assert label in plot
    assert {"512", "1k", "context (tokens)", "time (ms)", "a $x$", "b", "here"} <= set(texts(plot))
    assert "var(--ink)" in plot
    assert "var(--grid)" in plot
    assert not re.search(r"<metadata|<\?xml|#0a0b0c|#0d0e0f|#0f0e0d", plot)
    assert line_plot("t", [Series("a", [1], [1], AFTER)], "x", "y") == line_plot(
        "t", [Series("a", [1], [1], AFTER)], "x", "y"
    )


def test_legends_and_long_names_leave_the_axes_their_size():
    def height(plot) -> float:
        return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', plot).group(1))

    few = bar_plot("t", ["a"], [("one", AFTER, [1])], "x", "y")
    many = bar_plot(
        "t", ["a"], [(f"a long name of a variant, {i}", AFTER, [1]) for i in range(8)], "x", "y"
    )
    named = bar_plot(
        "t", [f"a long name of a group, {i}" for i in range(4)], [("one", AFTER, [1] * 4)], "x", "y"
    )
    assert height(many) > height(few) + 80
    assert height(named) > height(few) + 40
    assert "rotate(-25" in named


def test_stacked_bars_add_up():
    parts = [("weights", AFTER, [1.0, 2.0]), ("KV", BEFORE, [None, 6.0])]
    plot = stacked_bar_plot(
        "t", ["a", "b"], parts, "MiB", "variant", horizontal=True, totals=["1 MiB", "8 MiB"]
    )
    assert {"weights", "KV", "a", "b", "1 MiB", "8 MiB", "MiB", "variant"} <= set(texts(plot))
    assert texts(plot).index("a") < texts(plot).index("b")
    edges = [
        [float(x) for x in re.findall(r"[ML] ([\d.]+)", path)]
        for path in re.findall(r'<path d="([^"]+)"[^>]*clip-path[^>]*style="fill: [#u]', plot)
    ]
    lengths = [max(one) - min(one) for one in edges]
    assert lengths == pytest.approx(
        [lengths[0], 2 * lengths[0], 0, 6 * lengths[0]], rel=0.01, abs=1e-6
    )
    assert min(edges[3]) == pytest.approx(max(edges[1]), abs=0.01)  # on top of the part before


def test_the_roof_is_only_what_was_measured():
    points = [RooflinePoint("decode", 0.5, 5e9, AFTER), RooflinePoint("lost", None, 5e9, BEFORE)]
    shown = {}
    for name, bandwidth, compute in [
        ("both", 14.2e9, {"float32": 118e9, "bfloat16": None}),
        ("no compute", 14.2e9, {}),
        ("no peaks", None, {"float32": None}),
    ]:
        shown[name] = " ".join(texts(roofline_plot("Roofline", points, bandwidth, compute)))
        assert "lost" not in shown[name]
    assert "memory, measured: 14.2 GB/s" in shown["both"]
    assert "float32, measured: 118 GFLOP/s" in shown["both"]
    assert "bfloat16" not in shown["both"]
    assert "memory-bound" in shown["both"]
    assert "memory, measured" in shown["no compute"]
    assert "bound" not in shown["no compute"]
    assert "measured" not in shown["no peaks"]
    with pytest.raises(ValueError, match="points: got none"):
        roofline_plot("Roofline", points[1:], 1e9, {})


# ---- the page
# -------------------------------------------------------------------------------------------------


def test_the_page_allows_its_own_script_and_nothing_else():
    made = page(
        "T & <b>",
        "The finding.",
        [Section("S", tables=[pairs("F", {"a": "<i>"})]), Section("Nothing here")],
    )
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', made).group(1)
    script = re.search(r"<script>(.*?)</script>", made, flags=re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "T &amp; &lt;b&gt;</h1>" in made
    assert "<i>" not in made
    assert "Nothing here" not in made
    assert "<nav" not in made


def test_more_than_four_sections_have_a_table_of_contents():
    sections = [Section(f"S{i}", tables=[pairs("F", {"a": 1})]) for i in range(5)]
    made = page("T", "L", sections)
    assert re.findall(r'href="#([\w-]+)">(S\d)<', made) == [
        (f"section-{i + 1}", f"S{i}") for i in range(5)
    ]
    assert all(f'<section id="section-{i + 1}">' in made for i in range(5))
    assert "<nav" not in page("T", "L", sections[:4])


def test_a_missing_value_is_an_error():
    with pytest.raises(Exception, match="'lead' is undefined"):
        render("page.html.jinja", title="x", sections=[], script="", script_hash="")
