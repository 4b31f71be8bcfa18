"""The documentation's tables and figures of the benchmark, its table of what goes with what and the
results' indexes: made of the results files and of the code, and up to date with them.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bench import compatibility, docs, kernels, pages, results, run
from bench.attention import growth, ours, peer, race
from bench.docs import main
from effattn.profiling.device import Peaks

ROOT = Path(__file__).parents[2]
PEAKS = Peaks(
    "a CPU", "cpu", 1, "2026-01-01", {}, 1e10, 2e10, 1e10, {"float32": 1e11, "bfloat16": 1e9}, 1e-6
)


def test_the_pages_are_up_to_date_with_the_results():
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        new, figures = pages.update(text, ROOT)
        assert new == text, f"{page}: run `make pages`"
        for path, drawn in figures.items():  # the same numbers, whatever matplotlib drew them
            mark = drawn[drawn.index("<!-- data:") :].partition("-->")[0]
            assert mark in (ROOT / path).read_text(encoding="utf-8"), f"{path}: run `make pages`"


def test_the_page_of_what_goes_with_what_is_what_the_code_does():
    page = ROOT / "docs" / "compatibility.md"
    text = page.read_text(encoding="utf-8")
    assert compatibility.update(text) == text, f"{page}: run `make pages`"
    for said in (
        "| dense | yes |",
        "no (1)",
        "packed caches go with dense, block, topk and sliding",
    ):
        assert said in text


def test_the_kernels_page_has_the_predictions_of_the_results():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert kernels.update(text, ROOT) == text, "docs/kernels.md: run `make pages`"
    assert all(f"| {name} |" in text for name in kernels.HEADLINES)


def test_a_measurement_stands_beside_its_prediction(tmp_path):
    loop = dict(instructions=100, bytes=4096, flops=0, matrix="none")
    guessed = dict(fraction=0.8, limit="memory", bound_by="issue")
    each = dict(folder="decode", registers=32, blocks=4)
    predicted = {
        "environment": dict(triton="3.9", date="2026-01-02T03:04:05"),
        "kernels": [
            each | dict(name="known", main=loop | guessed),
            each | dict(name="unknown", main=None),
        ],
    }
    for path, plain in (
        (kernels.PREDICTED, predicted),
        (kernels.MEASURED, {"measured": {"decode known": 0.75}}),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(json.dumps(plain))
    table = kernels.table(tmp_path)
    assert "| decode known | 32 | 4 | 100 | 4096 | none | 80% of memory | issue | 75% |" in table
    assert "| decode unknown | 32 | 4 | ? | ? | ? | ? | ? |  |" in table
    assert kernels.update("<!-- kernels:predicted -->\nold<!-- /kernels -->", tmp_path) == (
        f"<!-- kernels:predicted -->\n{table}<!-- /kernels -->"
    )
    with pytest.raises(ValueError, match="a marker is not"):
        kernels.update("<!-- kernels:predicted -->", tmp_path)


def test_every_folder_of_results_has_an_index():
    for folder in (path for path in (ROOT / "results").rglob("*") if path.is_dir()):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text == docs.index(folder), f"{folder}: run `make pages`"
        for file in folder.iterdir():
            known = (*re.findall(r"\]\((.*?)\)", text), "README.md", docs.REAL)
            assert file.name in known


@pytest.fixture
def checkout(tmp_path):
    """A root with results of small cases, and a page with every block."""
    cpu = torch.device("cpu")
    raced = [peer("SDPA", "dense"), peer("SDPA", "sliding(window=16)"), ours("sliding(window=16)")]
    cases = [
        race(what, dtype, tokens, raced)
        for tokens in (64, 128)
        for what, dtype in (
            ("forward", "float32"),
            ("forward", "bfloat16"),
            ("forward+backward", "float32"),
        )
    ]
    cases += [
        race("step", "float32", 128, [ours("dense")], batch=4, kv_heads=2),
        growth("dense", 2, 1, (32, 64, 128)),
    ]
    found = run.judge(
        run.run(cases, cpu, results.new(results.settings(cpu, True, 0.0)), 0.0, PEAKS)
    )
    results.save(tmp_path / "results" / "here" / "bench.json", found)
    blocks = "\n\n".join(
        f"<!-- bench:here/{name} -->\nold\n<!-- /bench -->"
        for name in [*pages.BLOCKS, *pages.DRAWN]
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text(
        f"# Title\n\n{blocks}\n\nEnd | of it\n", encoding="utf-8"
    )
    return tmp_path


def test_blocks_and_figures(checkout, capsys):
    with pytest.raises(SystemExit):
        main(check=True, root=checkout)
    assert "old" in (checkout / "docs" / "benchmarks.md").read_text()
    main(check=False, root=checkout)
    text = (checkout / "docs" / "benchmarks.md").read_text()
    assert text.startswith(
        "# Title\n\n<!-- bench:here/forward -->\n| tokens | SDPA dense | effattn "
        "sliding(window=16) |"
    )
    assert text.endswith("<!-- /bench -->\n\nEnd | of it\n")
    assert "old" not in text
    saved = json.loads((checkout / "results" / "here" / "bench.json").read_text())
    ms = saved["cases"]["forward float32 B1 H8/8 D64 T64"]["contenders"]["SDPA dense"]["ms_p50"]
    assert f"{ms:.3g}" in text
    assert "SDPA sliding(window=16): absent, it has dense attention only" in text
    assert text.count("`results/here/bench.json`") == len(pages.BLOCKS) + len(pages.DRAWN)
    assert saved["environment"]["date"][:10] in text
    for name in pages.DRAWN:
        drawn = (checkout / "docs" / "figures" / f"here-{name}.svg").read_text()
        assert ElementTree.fromstring(drawn).tag.endswith("svg")  # whole by itself
        assert "prefers-color-scheme" in drawn
        assert f"(figures/here-{name}.svg)" in text
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    main(check=False, root=checkout)
    main(check=True, root=checkout)
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert "up to date" in capsys.readouterr().out


def test_what_is_wrong_with_a_page_is_said(tmp_path):
    def refused(text, said):
        with pytest.raises(ValueError, match=said):
            pages.update(text, tmp_path)

    refused("<!-- bench:here/forwrd -->\n<!-- /bench -->", "did you mean 'forward'")
    refused("<!-- bench:here/forward -->\n", "marker")
    refused("<!-- bench:here -->\n<!-- /bench -->", "marker")
    text, figures = pages.update("<!-- bench:here/forward -->\n<!-- /bench -->", tmp_path)
    assert "Not measured yet" in text
    assert figures == {}
    assert pages.update(text, tmp_path) == (text, {})
