"""The README's benchmark tables and figures: made of the results files, and up to date with
them.
"""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from bench import readme, results, run
from bench.attention import growth, ours, peer, race
from effattn.profiling.device import Peaks
from recipes.readme_figures import main

ROOT = Path(__file__).parents[2]
PEAKS = Peaks(
    "a CPU", "cpu", 1, "2026-01-01", {}, 1e10, 2e10, 1e10, {"float32": 1e11, "bfloat16": 1e9}, 1e-6
)


def test_the_readme_is_up_to_date_with_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    new, figures = readme.update(text, ROOT)
    assert new == text, "run `make readme-figures`"
    # the same numbers, whatever version of matplotlib drew them
    for path, drawn in figures.items():
        mark = drawn[drawn.index("<!-- data:") :].partition("-->")[0]
        assert mark in (ROOT / path).read_text(encoding="utf-8"), (
            f"{path}: run `make readme-figures`"
        )


@pytest.fixture
def checkout(tmp_path):
    """A root with results of small cases, and a README with every block."""
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
        for name in [*readme.BLOCKS, *readme.DRAWN]
    )
    (tmp_path / "README.md").write_text(f"# Title\n\n{blocks}\n\nEnd | of it\n", encoding="utf-8")
    return tmp_path


def test_blocks_and_figures(checkout, capsys):
    with pytest.raises(SystemExit):
        main(check=True, root=checkout)
    assert "old" in (checkout / "README.md").read_text()
    main(check=False, root=checkout)
    text = (checkout / "README.md").read_text()
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
    assert text.count("`results/here/bench.json`") == len(readme.BLOCKS) + len(readme.DRAWN)
    assert saved["environment"]["date"][:10] in text
    for name in readme.DRAWN:
        drawn = (checkout / "docs" / "figures" / f"here-{name}.svg").read_text()
        assert ElementTree.fromstring(drawn).tag.endswith("svg")  # whole by itself
        assert "prefers-color-scheme" in drawn
        assert f"docs/figures/here-{name}.svg" in text
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    main(check=False, root=checkout)
    main(check=True, root=checkout)
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert "up to date" in capsys.readouterr().out


def test_what_is_wrong_with_a_readme_is_said(tmp_path):
    def refused(text, said):
        with pytest.raises(ValueError, match=said):
            readme.update(text, tmp_path)

    refused("<!-- bench:here/forwrd -->\n<!-- /bench -->", "did you mean 'forward'")
    refused("<!-- bench:here/forward -->\n", "marker")
    refused("<!-- bench:here -->\n<!-- /bench -->", "marker")
    text, figures = readme.update("<!-- bench:here/forward -->\n<!-- /bench -->", tmp_path)
    assert "Not measured yet" in text
    assert figures == {}
    assert readme.update(text, tmp_path) == (text, {})
