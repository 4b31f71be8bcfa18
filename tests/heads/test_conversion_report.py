"""Conversion reports: the same numbers in JSON, Markdown, HTML and on the terminal; nothing
invented.
"""

import copy
import io
import json
import os
import re

import pytest
from rich.console import Console

from effattn.heads.report import ConversionReport, compare_html
from effattn.reports.files import write_text_atomic

ENVIRONMENT = {"device": "a processor", "torch": "2.99", "triton": None, "threads": 1}


def timed(ms: float, kv_bytes: int) -> dict:
    return {
        "ms_p20": 0.9 * ms,
        "ms_p50": ms,
        "ms_p80": 1.2 * ms,
        "tokens_per_s": 1000 / ms,
        "kv_bytes": kv_bytes,
    }


def scores(perplexity: float, cross_entropy: float, kl: float) -> dict:
    return {"perplexity": perplexity, "cross_entropy": cross_entropy, "kl": kl}


def data(kv_heads: int = 2, method: str = "optimal") -> dict:
    return copy.deepcopy(
        {
            "kind": "convert_gqa",
            "settings": {
                "model": "some-model",
                "kv_heads": kv_heads,
                "method": method,
                "refit": True,
                "seed": 3,
                "grouping": "contiguous",
                "calibration_tokens": 50_017,
                "uptrain_tokens": 3_000_001,
            },
            "model": {
                "model_type": "llama",
                "layers": 2,
                "heads": 8,
                "kv_heads_before": 8,
                "kv_heads_after": kv_heads,
                "head_dim": 32,
                "hidden": 256,
                "parameters_before": 8_123_456,
                "parameters_after": 7_654_321,
                "dtype": "float32",
            },
            "quality": {
                "tokens": 65_536,
                "context": 512,
                "source": "held-out text",
                "before": {"perplexity": 9.1234, "cross_entropy": 2.2108},
                "converted": scores(11.5678, 2.4482, 0.2121),
                "uptrained": scores(9.4321, 2.2441, 0.0313),
            },
            "uptraining": {
                "tokens": 3_000_320,
                "share_of_pretraining": 0.05,
                "seconds": 321.5,
                "curve": [
                    {"tokens": 0, **scores(11.5678, 2.4482, 0.2121)},
                    {"tokens": 1_500_160, **scores(9.8765, 2.2901, 0.0707)},
                    {"tokens": 3_000_320, **scores(9.4321, 2.2441, 0.0313)},
                ],
            },
            "layers": [
                {
                    "layer": i,
                    "k_error": 0.3111 + i,
                    "v_error": 0.4222,
                    "attention_error_merged": 0.0533,
                    "attention_error": 0.0144,
                }
                for i in range(2)
            ],
            "kv_bytes_per_token": {"before": 16_384, "after": 2048 * kv_heads},
            "decode": [
                {
                    "context": 512,
                    "batch": 1,
                    "before": timed(2.0, 8 << 20),
                    "after": timed(1.6, 2 << 20),
                },
                {
                    "context": 16_384,
                    "batch": 1,
                    "before": timed(8.0, 1 << 28),
                    "after": timed(3.2, 1 << 26),
                },
            ],
            "verification": {
                "fresh_process": True,
                "max_logit_difference": 3.25e-6,
                "cache_shape": [1, 2, 64, 32],
                "kv_heads_in_cache": kv_heads,
            },
            "environment": ENVIRONMENT,
        }
    )


def lean(*keep: str) -> dict:
    """The data with only the named parts that have plots, which take most of the time."""
    drop = {"uptraining", "layers", "decode", "kv_bytes_per_token"} - set(keep)
    return {key: None if key in drop else value for key, value in data().items()}


def terminal(thing, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(thing)
    return out.getvalue()


def visible(page: str) -> str:
    """The page's text without the plots."""
    return re.sub(
        r"<[^>]+>", " ", re.sub(r"<(svg|style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    )


HEADLINE = [
    "9.1234",
    "11.5678 (+26.8 %)",
    "9.4321 (+3.4 %)",
    "2.2108",
    "2.4482",
    "2.2441",
    "0.2121",
    "0.0313",
    "16,384",
    "4,096",
    "8,123,456",
    "7,654,321",
    "4.0x smaller",
    "500.0",
    "625.0",
    "1.25x",
    "125.0",
    "312.5",
    "2.50x",
    "8.0 MiB",
    "256.0 MiB",
    "64.0 MiB",
    "3.25e-06",
    "[1, 2, 64, 32]",
]
DETAILS = [
    "8.00 (7.20 to 9.60)",
    "1,500,160",
    "9.8765",
    "0.0707",
    "321.5",
    "5 %",
    "0.3111",
    "1.3111",
    "0.4222",
    "0.0533",
    "0.0144",
    "50,017",
    "float32",
    "2.99",
    "held-out text",
]


def test_every_format_has_the_numbers():
    report = ConversionReport(data())
    assert json.loads(report.to_json()) == data()
    assert not [cell for cell in HEADLINE if cell not in terminal(report)]
    page = report.to_html()
    for text in (report.to_markdown().replace("\\", ""), visible(page)):
        assert not [cell for cell in HEADLINE + DETAILS if cell not in text]
    assert (
        "8 -> 2 KV heads: the KV cache is 4.0x smaller; perplexity 9.12 -> 9.43 (+3.4 %)"
        in report.headline
    )
    assert "16,384 tokens runs at 2.50x the speed" in report.headline
    assert page.count("<svg") == 5  # perplexity, KL, cache, speed, layers


PARTS = [
    "quality",
    "uptraining",
    "layers",
    "decode",
    "verification",
    "environment",
    "kv_bytes_per_token",
    "settings",
]


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_missing_parts_are_not_measured_and_never_zero(part, absent):
    given = data()
    for name in PARTS if part == "all" else [part]:
        if absent:
            del given[name]
        else:
            given[name] = None
    report = ConversionReport(given)
    texts = [terminal(report), report.to_markdown()]
    if absent == (part == "all"):  # once a part: plots take time
        texts.append(visible(report.to_html()))
    json.loads(report.to_json())
    for text in texts:
        assert "None" not in text
        assert "nan" not in text
        if part in ("quality", "all"):
            assert "not measured" in text
            assert not re.search(r"Perplexity[\s│|]+0", text)
            assert "9.12" not in text
    if part == "decode":
        assert "Decoding" not in texts[0]
        assert "the speed" not in report.headline
    if part == "all":
        assert report.headline == "8 -> 2 KV heads; quality was not measured."
        assert "<svg" not in report.to_html()


def test_no_uptraining_says_so():
    given = data()
    given["uptraining"] = given["quality"]["uptrained"] = None
    given["settings"]["uptrain_tokens"] = 0
    report = ConversionReport(given)
    assert terminal(report).count("no uptraining") == 5
    assert "perplexity 9.12 -> 11.57 (+26.8 %)" in report.headline


def test_layers_without_calibration_or_refit():
    given = lean("layers")
    for row in given["layers"]:
        row["attention_error"] = None
    page = ConversionReport(given).to_html()
    assert "not measured" in page
    assert "after O re-fit</text>" not in page  # no bars, so no legend entry
    for row in given["layers"]:
        row |= dict.fromkeys(("k_error", "v_error", "attention_error_merged"))
    assert ConversionReport(given).to_html().count("<svg") == 0


def test_a_cache_that_did_not_fit_is_named_and_not_plotted():
    given = lean("decode")
    given["decode"][1]["before"] = {"kv_bytes": 1 << 28, "does_not_fit": 1 << 29}
    report = ConversionReport(given)
    for text in (terminal(report), report.to_markdown(), visible(report.to_html())):
        assert "does not fit (needs 512.0 MiB)" in text
    assert "512 tokens runs at 1.25x" in report.headline


def test_the_parent_is_drawn_only_where_it_is_comparable():
    given = lean("uptraining")
    report = ConversionReport(given)
    assert report.curve_parent == 9.1234
    given["uptraining"]["curve"][0]["perplexity"] = 11.0  # measured on other tokens
    assert report.curve_parent is None
    assert "other tokens" in report.to_html()
    given["uptraining"]["parent"] = {"perplexity": 8.9}
    assert report.curve_parent == 8.9
    assert "other tokens" not in report.to_html()


def test_numbers_that_are_not_finite_stay_valid_json():
    given = lean("uptraining")
    given["quality"]["converted"] = scores(float("inf"), float("nan"), float("nan"))
    given["uptraining"]["curve"][0] = {
        "tokens": 0,
        **scores(float("inf"), float("nan"), float("nan")),
    }
    report = ConversionReport(given)
    assert json.loads(report.to_json())["quality"]["converted"]["kl"] is None
    assert "nan" in terminal(report)
    assert report.to_html().count("<svg") == 2


@pytest.mark.parametrize("make", [ConversionReport.to_html, lambda report: compare_html([report])])
def test_html_is_self_contained_and_escaped(make):
    given = data()
    given["settings"]["model"] = "<b>x</b>"
    given["settings"]["method"] = "<i>a|$b$</i>"
    page = make(ConversionReport(given))
    links = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(link|img|iframe)\b|@import|url\((?!#)|src=", page)
    assert len(re.findall(r"<script\b", page)) == 1  # the page's own
    assert "default-src 'none'" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "prefers-color-scheme: dark" in page


def test_markdown_cells_hold_their_text():
    given = data()
    given["settings"]["model"] = "a|b <b>\nc"
    text = ConversionReport(given).to_markdown()
    assert "| model | a\\|b \\<b> c |" in text
    tables = [line for line in text.splitlines() if line.startswith("| model |")]
    assert len(tables) == 1


def test_compare_shows_every_report():
    reports = [
        ConversionReport(data(kv, method)) for kv in (4, 2) for method in ("optimal", "mean")
    ]
    reports[3].data["quality"]["uptrained"] = scores(9.9999, 2.3025, 0.1)
    page = compare_html(reports)
    text = visible(page)
    assert text.count("8 -&gt; 4") == text.count("8 -&gt; 2") == 2
    for cell in (
        "9.9999",
        "0.0917",
        "0.0333",
        "2.50x at 16,384",
        "2 KV heads: optimal is closest to the parent",
    ):
        assert cell in text, cell
    # excess after conversion and uptraining, curves of 4 and of 2 KV heads
    assert page.count("<svg") == 4
    for report in reports:
        report.data["quality"] = report.data["uptraining"] = None
    assert "<svg" not in compare_html(reports)
    with pytest.raises(ValueError, match="got none"):
        compare_html([])


def test_compare_tells_equal_methods_apart():
    one, two = ConversionReport(data()), ConversionReport(data())
    two.data["settings"]["refit"] = False
    text = visible(compare_html([one, two, two]))
    assert "optimal + O re-fit" in text
    assert "optimal #2" in text


def test_save_and_load(tmp_path):
    folder = tmp_path / "new" / "folder"
    report = ConversionReport(lean())
    report.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert (
        ConversionReport.load(folder).data
        == ConversionReport.load(folder / "report.json").data
        == report.data
    )
    assert (folder / "report.md").read_text() == report.to_markdown()
    with pytest.raises(ValueError, match="'other'"):
        ConversionReport({"kind": "other"})


@pytest.mark.parametrize("name", ["report.md", "report.html", "report.json"])
def test_a_failing_save_changes_nothing(tmp_path, monkeypatch, name):
    (tmp_path / "report.json").write_text("old")
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1 + ["report.md", "report.html", "report.json"].index(name):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ConversionReport(lean()).save(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "old"}


def test_json_is_put_in_place_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append(os.path.basename(b)), replace(a, b))
    )
    ConversionReport(lean()).save(tmp_path)
    assert order[-1] == "report.json"


def test_write_text_atomic_replaces_and_cleans_up(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "two ü")
    assert path.read_text(encoding="utf-8") == "two ü"
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_text_atomic(path, "three")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
