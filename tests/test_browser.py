"""Every kind of report page in a real headless browser: it renders, sorts, is light and dark, and asks for nothing.

Add a page to `PAGES`: its tests come by themselves. Skipped where there is no browser, but a failure in CI.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from effattn.prune.oneshot_report import OneShotReport
from effattn.prune.shear_report import ShearReport
from effattn.prune.structured_report import StructuredReport
from effattn.quant.sensitivity.report import QuantizeReport
from test_conversion_report import data as conversion_data
from test_extend_recipe import data as article_data
from test_measure_report import data as measure_data
from test_quantize_report import data as quantize_data

from effattn.extending.article_report import ArticleReport
from effattn.extending.report import ExtendReport
from effattn.heads.report import ConversionReport, compare_html
from effattn.linearizing.approximation_report import ApproximationReport
from effattn.linearizing.report import LinearizeReport
from effattn.measuring.report import Report as MeasureReport
from effattn.reports.page import Section, page
from effattn.reports.plots import (
    AFTER,
    BEFORE,
    UPTRAINED,
    RooflinePoint,
    Series,
    line_plot,
    roofline_plot,
    stacked_bar_plot,
)
from effattn.reports.tables import Table, pairs
from effattn.swapping.report import SwapReport

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
PHONE, DESK = {"width": 375, "height": 800}, {"width": 1200, "height": 900}


# ---- one maker for each kind of page --------------------------------------------------------------------------------


def conversion() -> str:
    return ConversionReport(conversion_data()).to_html()


def sweep() -> str:
    return compare_html(
        [ConversionReport(conversion_data(kv, method)) for kv in (4, 2) for method in ("mean", "first")]
    )


def swap() -> str:
    def stream(perplexity: float) -> dict:
        spans = [{"first": first, "last": last, "perplexity": perplexity + first, "cross_entropy": 2.0}
                 for first, last in ((0, 128), (128, 512), (512, 2000))]  # fmt: skip
        return {"tokens": 2000, "seconds": 1.5, "spans": spans, "buckets": spans,
                "cache_bytes": [[128, 1 << 18], [512, 1 << 20], [2000, 1 << 22]]}  # fmt: skip

    def run(label: str, role: str, perplexity: float) -> dict:
        contexts = [{"context": c, "perplexity": perplexity + c, "seconds": 0.5} for c in (128, 256, 512, 1024)]
        text = {"tokens": 3, "within": "def f(x):\n", "past": "    return <x>\n", "seconds": 1.0}
        return {"label": label, "role": role, "pattern": label, "contexts": contexts, "stream": stream(perplexity),
                "text": text, "layers": [label, label]}  # fmt: skip

    settings = {"model": "some-model", "patterns": ["sliding(window=64, sinks=4)"], "chunk": 64, "stream_tokens": 2000,
                "evaluation_tokens": 4096, "prompt_tokens": 100, "generate_tokens": 50, "temperature": 0, "seed": 1,
                "text": "a" * 300}  # fmt: skip
    runs = [run("dense (before)", "before", 90.0), run("sliding(window=64, sinks=4)", "pattern", 20.0),
            run("sliding(window=64)", "baseline", 25.0)]  # fmt: skip
    proof = {"max_logit_difference": 0.0, "tokens": 256, "patterns_after_loading": ["sliding(window=64, sinks=4)"]}
    return SwapReport({
        "kind": "swap_backend", "settings": settings, "model": {"class": "Llama", "trained_length": 512}, "runs": runs,
        "reference": {"context": 512, **{k: v for k, v in stream(18.0).items() if k != "cache_bytes"}},
        "prompt": {"text": "import os\n" * 9, "tokens": 100}, "verification": proof, "environment": {"torch": "2.99"},
    }).to_html()  # fmt: skip


def measure() -> str:
    return MeasureReport(measure_data()).to_html()


def linearize() -> str:
    def quality(perplexity: float) -> dict:
        return {"perplexity": perplexity, "cross_entropy": 2.0, "kl": 0.1}

    curve = [{"tokens": tokens, **quality(1e6 / (tokens + 1e4))} for tokens in (0, 100_000, 200_000)]
    layers = [
        {"layer": i, "pattern": "linear(decay=[" + "0.99609375, " * 8 + "])", "projections": "dense"} for i in (0, 1)
    ]
    return LinearizeReport({
        "kind": "linearize", "layers": layers, "pretraining_tokens": 12_000_000, "verification": {"tokens": 64},
        "settings": {"model": "some-model", "pattern": "linear", "projections": None, "keep_every": 0, "keep": "dense"},
        "model": {"class": "Llama", "parameters_before": 10, "parameters_after": 12}, "environment": {"torch": "2.99"},
        "quality": {"before": quality(17.0), "tokens": 4096, "context": 512, "source": "some text"},
        "stages": {stage: quality(value) for stage, value in (("swap", 90.0), ("transfer", 30.0))},
        "transfer": {"tokens": 1000, "before": [0.5, 0.7], "after": [0.1, 0.2]},
        "distillation": {"tokens": 2000, "curve": curve, "parent": quality(17.0)},
        "state_bytes": [{"context": c, "plain": 8192 * c, "ours": 400_000} for c in (1024, 8192, 65536)],
    }).to_html()  # fmt: skip


def quantize() -> str:
    return QuantizeReport(quantize_data()).to_html()


def approximation() -> str:
    cost = {"flops": 5, "dense_flops": 10, "state_bytes": 3, "dense_state_bytes": 9}
    rows = [{"method": method, "option": "rounds", "budget": budget, "inputs": name, "error": 1 / (1 + place), **cost}
            for method, budgets in (("lsh", (1, 2, 4)), ("linear", ("elu", "relu")))
            for place, budget in enumerate(budgets) for name in ("layer 0", "layer 1", "N(0, 1)")]  # fmt: skip
    matrices = [{"matrix": name, "ratio": ratio, "kept": ratio, "error": 1 - ratio}
                for name in ("Gaussian", "q") for ratio in (0.25, 0.5)]  # fmt: skip
    facts = {"class": "Llama", "tokens": 512}
    made = {"kind": "approximation", "model": facts, "rows": rows, "matrices": matrices, "environment": {"torch": "2"}}
    return ApproximationReport(made).to_html()


def shear() -> str:
    def quality(perplexity: float) -> dict:
        return {"perplexity": perplexity, "cross_entropy": 2.0, "kl": 0.1}

    def training(tokens: int, masked: bool) -> dict:
        points = [{"step": i, "tokens": i * tokens // 2, "losses": [3.0 - i, 2.5], "weights": [0.7, 0.3]}
                  for i in range(3)]  # fmt: skip
        shares = {"removed": {"heads": 0.1, "ffn": 0.2}, "target": {"heads": 0.5, "ffn": 0.5}} if masked else {}
        return {"tokens": tokens, "domains": ["code", "prose <b>"], "references": [1.5, 2.0],
                "target": {"heads": 4, "ffn": 352}, "record": [point | shares for point in points]}  # fmt: skip

    sizes = {"parameters": 4_000_000, "layer_parameters": 3_000_000, "file_bytes": None, "kv_bytes_per_token": 8192,
             "flops_per_token": 7e6}  # fmt: skip
    row = {"cut": quality(90.0), "continued": quality(30.0), "training": training(200_000, False)}
    return ShearReport({
        "kind": "shear", "settings": {"model": "some-model", "heads": 4, "distill": True, "domains": ["a.txt", "b"]},
        "target": {"hidden": [256, 256], "heads": [8, 4], "ffn": [704, 352], "layers": [4, 4]},
        "model": {"class": "Llama"}, "size": {"before": sizes, "after": sizes | {"parameters": 2_400_000}},
        "quality": {"before": quality(17.0), "cut": quality(40.0), "recovered": quality(25.0),
                    "continued": quality(21.0), "tokens": 4096, "context": 512, "source": "some text"},
        "masks": training(100_000, True), "recovered": training(50_000, False),
        "continued": training(100_000, False), "baselines": {"scratch": row},
        "speed": [{"what": "reading 512 tokens", "before": 9e3, "after": 1.5e4}], "verification": {"tokens": 64},
        "pretraining_tokens": 12_000_000, "environment": {"torch": "2.99"},
    }).to_html()  # fmt: skip


def prune_oneshot() -> str:
    def quality(perplexity: float) -> dict:
        return {"perplexity": perplexity, "cross_entropy": perplexity / 10, "kl": 0.1}

    linear = {"name": "self_attn.q_proj", "shape": [64, 64], "zeros": 2048, "loss": 1.5, "damping": 0.01}
    layers = [{"layer": i, "sparsity": "0.5", "weights": 4096, "zeros": 2048, "error": 0.01 + i, "seconds": 1.5,
               "linears": [linear]} for i in range(3)]  # fmt: skip
    runs = [{"method": method, "sparsity": sparsity, "seconds": 2.5, "errors": [0.1, None], **quality(30.0)}
            for sparsity in ("0.5", "2:4", "0.5, <0.4>") for method in ("sparsegpt", "wanda", "magnitude")]  # fmt: skip
    sizes = {"parameters": 4_000_000, "nonzero_parameters": 2_400_000, "weight_bytes": 16_000_000,
             "file_bytes": 16_004_000, "kv_bytes_per_token": 8192, "flops_per_token": 8_000_000,
             "flops_of_nonzeros": 4_800_000}  # fmt: skip
    curve = [{"tokens": tokens, **quality(22.0 - tokens / 1e5)} for tokens in (0, 100_000, 200_000)]
    timed = {"tokens_per_s": 100.0, "kv_bytes": 1 << 20}
    return OneShotReport({
        "kind": "prune_oneshot", "settings": {"model": "some-model", "method": "sparsegpt", "sparsity": "0.5"},
        "model": {"class": "Llama"}, "layers": layers, "sizes": {"before": sizes, "after": sizes}, "runs": runs,
        "quality": {"tokens": 4096, "context": 512, "source": "some text", "before": quality(20.0),
                    "pruned": quality(22.0), "distilled": quality(20.5)},
        "distillation": {"tokens": 200_000, "curve": curve, "parent": {"perplexity": 20.0}},
        "decode": [{"context": 512, "before": timed, "after": {"does_not_fit": 1 << 40}}],
        "verification": {"max_logit_difference": 0.0}, "environment": {"torch": "2.99"},
    }).to_html()  # fmt: skip


def extend() -> str:
    names = {"name": "yarn", "spec": "yarn(length=4096)", "tuning": "helps", "plain": True}
    taken = names | {"predicts": "4 dimensions kept", "refused": ""}
    refused = {**taken, "name": "pi", "spec": "pi(length=4096)", "refused": "changed already, by <linear>"}
    plan = {"trained": 512, "target": 4096, "factor": 8.0, "base": 1e4, "dims": 32, "own": "default", "turned": 16,
            "length_law": 512.0, "wavelengths": [6.28 * 1.8**i for i in range(16)], "candidates": [taken, refused],
            "recommended": taken, "reason": "it is plain"}  # fmt: skip
    quality = [{"stage": stage, "lengths": [{"length": n, "cross_entropy": 2.9, "perplexity": 18.0, "accuracy": 0.4}
                                            for n in (512, 4096)]} for stage in ("before", "after tuning")]  # fmt: skip
    losses = [{"tokens": 1000 * i, "loss": 4.0 - i / 10} for i in range(1, 9)]
    return ExtendReport({
        "kind": "extend", "settings": {"model": "some-model", "to": 4096, "source": "some text"}, "plan": plan,
        "rule": {"spec": "yarn(length=4096)", "plain": True}, "model": {"class": "Llama"}, "quality": quality,
        "tuning": {"tokens": 8000, "window": 512, "losses": losses}, "verification": {"max_logit_difference": 0.0},
        "environment": {"torch": "2.99"},
    }).to_html()  # fmt: skip


def extend_context() -> str:
    return ArticleReport(article_data()).to_html()


def structured() -> str:
    def run(criterion: str, compensation: str, excess: float) -> dict:
        return {"criterion": criterion, "compensation": compensation, "perplexity": 17.0, "kl": 0.1, "seconds": 9.5,
                "cross_entropy": 2.8 + excess}  # fmt: skip

    sizes = {"layers": 9, "heads": 8, "kv_heads": 8, "head_dim": 32, "ffn": 704, "parameters": 4_000_000,
             "weight_bytes": 16_000_000, "file_bytes": 16_004_000, "kv_bytes_per_token": 8192,
             "flops_per_token": 7_000_000}  # fmt: skip
    errors = [{"layer": i, "heads_error_sliced": 0.3, "heads_error": 0.2, "ffn_error_sliced": 0.1, "ffn_error": 0.05}
              for i in range(8)]  # fmt: skip
    speed = {"tokens_per_s": 100.0, "kv_bytes": 4096}
    return StructuredReport({
        "kind": "prune_structured", "settings": {"model": "some-model", "heads": 4, "ffn": 528, "layers": 8,
                                                 "criterion": {"heads": "taylor <b>"}},
        "model": {"class": "Llama"}, "kept": {"layers": list(range(8))}, "layers": errors,
        "importance": {"heads": [[1.0, 0.5, 0.25, 0.0] * 2] * 9, "ffn": [list(range(101))] * 9, "layers": [0.5] * 9},
        "sizes": {"before": sizes, "after": sizes | {"heads": 4, "kv_heads": 4, "parameters": 3_000_000}},
        "quality": {"before": {"perplexity": 16.0, "cross_entropy": 2.8}, "pruned": run("taylor", "weights", 0.1),
                    "tokens": 4096, "context": 512, "source": "some text"},
        "runs": [run(name, kind, 0.1) for name in ("taylor", "random") for kind in ("weights", "nothing")],
        "decode": [{"context": 512, "before": speed, "after": speed}], "verification": {"fresh_process": True},
        "environment": {"torch": "2.99"},
    }).to_html()  # fmt: skip


UNITS = [  # label, time, size, count, ratio; in the order of each column ascending: ORDER
    ["b", "1.2 s", "2.0 GiB", "4,096", "9.20x"],
    ["a", "12.3 ms", "900.0 KiB", "512", "10.1x (+5 %)"],
    ["c", "not measured", "does not fit: needs 9.0 GiB", "16k", "not measured"],
    ["d", "450 µs", "1.2 MiB", "<= 70,000", "-"],
    ["e", "2 min", "12 B", "1e6", "-0.5x"],
]
ORDER = [
    "abcde",
    "dabec",
    "eadbc",
    "abcde",
    "ebadc",
]  # labels ascending by each column; unknown last, in the order they had


def plots() -> str:
    contexts, names = [1024, 4096, 16384], ["dense", "sliding(window=512)", "linear"]
    lines = [Series(name, contexts, [3, 4 + i, None if i else 40], color)
             for i, (name, color) in enumerate(zip(names, (BEFORE, AFTER, UPTRAINED), strict=True))]  # fmt: skip
    points = [RooflinePoint("dense, decode", 0.5, 5e9, BEFORE), RooflinePoint("dense, prefill", 190, 9e10, BEFORE, "s")]
    parts = [("weights", AFTER, [40.0, 40.0, 40.0]), ("KV", BEFORE, [128.0, 4.0, None])]
    speed = Table("Units", ("Variant", "Time", "Memory", "Context", "Against dense"), UNITS, "Made-up values.\n" * 2)
    drawn = [
        line_plot("Time", lines, "context (tokens)", "time (ms)", contexts=True, log_y=True),
        roofline_plot("Roofline", points, 14e9, {"float32": 118e9}),
        stacked_bar_plot("Bytes", names, parts, "MiB", "variant", horizontal=True, totals=["168", "44", "40"]),
    ]
    sections = [Section("Plots", "A note.", drawn, [speed])]
    return page("A title", "The finding.", [*sections, *(Section(n, tables=[pairs(n, {"a": 1})]) for n in "ABCD")])


PAGES: dict[str, tuple[Callable[[], str], int]] = {  # name -> (maker of the HTML, its number of plots)
    "prune_oneshot": (prune_oneshot, 3),
    "conversion": (conversion, 5),
    "sweep": (sweep, 4),
    "swap": (swap, 3),
    "plots": (plots, 3),
    "measure": (measure, 9),
    "linearize": (linearize, 4),
    "approximation": (approximation, 3),
    "quantize": (quantize, 7),
    "shear": (shear, 5),
    "structured": (structured, 5),
    "extend": (extend, 2),
    "extend_context": (extend_context, 4),
}


# ---- the browser ----------------------------------------------------------------------------------------------------


def lacking(reason: str) -> None:
    """Skips; in CI a missing browser is a failure."""
    (pytest.fail if os.environ.get("CI", "") not in ("", "0", "false") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright is not installed: pip install -e '.[test]'")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        lacking(f"no browser: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in PAGES}
    for name, (make, _) in PAGES.items():
        made[name].write_text(make(), encoding="utf-8")
    return made


@pytest.fixture
def visit(browser, files) -> Iterator[Callable]:
    """visit(name, **context options) -> (page, seen): opens it; `seen` collects complaints, requests (also those that
    the page's policy blocks), and what was on its way to the network and stopped here."""
    contexts = []

    def visit(name: str, **options):
        context = browser.new_context(**{"viewport": DESK, "color_scheme": "light", **options})
        context.set_default_timeout(10_000)  # milliseconds
        contexts.append(context)
        seen = SimpleNamespace(complaints=[], requests=[], stopped=[])
        context.on("console", lambda message: seen.complaints.append(message.text))
        context.on("weberror", lambda error: seen.complaints.append(str(error.error)))
        context.on("request", lambda request: seen.requests.append(request.url))
        context.route(
            re.compile(r"^(?!file:|data:)"), lambda route: (seen.stopped.append(route.request.url), route.abort())
        )
        opened = context.new_page()
        opened.goto(files[name].as_uri())
        return opened, seen

    yield visit
    for context in contexts:
        context.close()


def column(table, index: int) -> list[str]:
    return [row.locator("th, td").nth(index).inner_text() for row in table.locator("tbody tr").all()]


every_page = pytest.mark.parametrize("name", PAGES)


@every_page
def test_it_renders_without_a_complaint_or_a_request(visit, files, name):
    opened, seen = visit(name)
    assert opened.title() == opened.locator("h1").inner_text() != ""
    assert opened.locator("p.lead").inner_text().endswith(".")
    drawn = opened.locator("main svg")
    assert drawn.count() == PAGES[name][1]
    for one in drawn.all():
        box = one.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
        assert one.locator("text").count() > 5
        assert one.get_attribute("role") == "img"
        assert one.get_attribute("aria-label")
    for link in opened.locator("nav a").all():
        assert opened.locator(link.get_attribute("href")).count() == 1
    opened.locator("#theme").click()
    opened.emulate_media(media="print")
    assert seen.requests == [files[name].as_uri()]
    assert seen.complaints == []


@every_page
def test_every_table_sorts_and_loses_nothing(visit, name):
    opened, seen = visit(name)
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    tables = [one for one in opened.locator("table:not(.facts)").all() if one.locator("tbody tr").count() > 1]
    assert tables
    for table in tables:
        before = table.locator("tbody tr").all_inner_texts()
        buttons = table.locator("thead th button")
        assert buttons.count() == table.locator("thead th").count()
        for index in (0, buttons.count() - 1):
            for direction in ("ascending", "descending"):
                buttons.nth(index).click()
                assert table.locator("thead th[aria-sort]").count() == 1
                assert table.locator("thead th").nth(index).get_attribute("aria-sort") == direction
                assert sorted(table.locator("tbody tr").all_inner_texts()) == sorted(before)
    assert seen.complaints == []


def test_numbers_sort_by_their_size_and_unit(visit):
    opened, _ = visit("plots")
    table = opened.locator("table:not(.facts)")
    for index, labels in enumerate(ORDER):
        button = table.locator("thead th button").nth(index)
        button.focus()
        opened.keyboard.press("Enter")
        assert "".join(column(table, 0)) == labels
        opened.keyboard.press("Space")
        unknown = [row[0] for row in UNITS if index and (row[index] == "-" or row[index].startswith(("not", "does")))]
        known = [label for label in reversed(labels) if label not in unknown]
        assert column(table, 0) == known + [label for label in labels if label in unknown]  # unknown stays last
        assert table.locator("thead th").nth(index).get_attribute("aria-sort") == "descending"


CONTRASTS = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = rgb(getComputedStyle(one).backgroundColor);
      if (color.length === 3) return color;
    }
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility()) continue;
    const style = getComputedStyle(one);
    const pair = [rgb(one instanceof SVGElement ? style.fill : style.color), behind(one)].map(light);
    found.push([one.textContent.slice(0, 40), (Math.max(...pair) + .05) / (Math.min(...pair) + .05)]);
  }
  return found;
}"""


@every_page
def test_light_and_dark_are_both_readable(visit, name):
    backgrounds = {}
    for scheme in ("light", "dark"):
        opened, _ = visit(name, color_scheme=scheme)
        opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        found = opened.evaluate(CONTRASTS)
        assert len(found) > 30
        assert [one for one in found if one[1] < 4.5] == []

        def background(media: str, opened=opened) -> str:
            opened.emulate_media(media=media)
            return opened.evaluate("getComputedStyle(document.body).backgroundColor")

        backgrounds[scheme] = background("screen")
        assert background("print") == "rgb(255, 255, 255)"  # paper is white whatever the screen is
        opened.emulate_media(media="screen")
        assert opened.locator("#theme").inner_text() == {"light": "Dark", "dark": "Light"}[scheme]
        opened.locator("#theme").click()
        backgrounds[f"{scheme}, turned"] = background("screen")
        assert [one for one in opened.evaluate(CONTRASTS) if one[1] < 4.5] == []
        assert background("print") == "rgb(255, 255, 255)"
    assert backgrounds["light"] == backgrounds["dark, turned"] != backgrounds["dark"] == backgrounds["light, turned"]


@every_page
def test_a_phone_shows_it_without_scrolling_sideways(visit, name):
    opened, _ = visit(name, viewport=PHONE)
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    smallest = opened.evaluate("""() => Math.min(...[...document.querySelectorAll("main svg text")].map((one) =>
        parseFloat(getComputedStyle(one).fontSize) * Math.abs(one.ownerSVGElement.getScreenCTM().a)))""")
    assert smallest >= 8  # CSS pixels


@every_page
def test_without_scripts_it_is_complete(visit, name):
    opened, _ = visit(name, java_script_enabled=False)
    assert opened.locator("main svg").count() == PAGES[name][1]
    assert opened.locator("tbody tr").count() > 3
    assert opened.locator("button:visible").count() == 0
    assert "".join(opened.locator("thead th").all_inner_texts()).strip()


def test_its_policy_stops_requests_and_foreign_scripts(visit):
    opened, seen = visit("plots")
    ran = opened.evaluate("""async () => {
        const stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
        const image = new Image();
        image.src = "https://example.org/a.png";
        const script = document.createElement("script");
        script.textContent = "window.ran = true;";
        document.body.append(image, script);
        await fetch("https://example.org/").catch(() => 0);
        await new Promise((done) => setTimeout(done, 50));
        return [window.ran ?? false, ...stopped.sort()];
    }""")
    assert ran == [False, "connect-src", "img-src", "script-src-elem"]
    assert seen.stopped == []  # none came as far as the network
