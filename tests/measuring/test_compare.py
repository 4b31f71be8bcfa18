"""`effattn compare`: worse is beyond the spread and the tolerance, and the exit code says it."""

from __future__ import annotations

import copy
import json

import pytest
from test_measure_report import data, lost, row, with_row
from typer.testing import CliRunner

from effattn.measuring.compare import compare, load
from effattn.recipes.cli import app


def bench(**times) -> dict:
    """A benchmark's result: contender -> (p20, p50, p80), or what is there instead."""
    rows = {
        who: dict(zip(("ms_p20", "ms_p50", "ms_p80"), found, strict=True))
        if isinstance(found, tuple)
        else found
        for who, found in times.items()
    }
    return {
        "kind": "bench_attention",
        "cases": {"forward": {"contenders": rows}},
        "environment": {"device": "a device"},
    }


def test_the_same_is_the_same():
    found = compare(data(), data())
    assert len(found.changes) == 8 * 5
    assert (found.worse, found.better, found.missing, found.new, found.warnings) == (
        [],
        [],
        [],
        [],
        [],
    )
    assert found.finding == "Nothing got slower or bigger beyond the noise (40 numbers compared)."


@pytest.mark.parametrize(
    ("before", "after", "tolerance", "verdict"),
    [
        ((9, 10, 11), (12, 13, 14), 0.05, "worse"),
        ((9, 10, 11), (10.9, 13, 14), 0.05, "same"),  # the spreads overlap
        ((9, 10, 11), (12, 13, 14), 0.35, "same"),  # within the tolerance
        ((9.9, 10, 10.1), (10.2, 10.4, 10.6), 0.05, "same"),
        ((9.9, 10, 10.1), (10.2, 10.4, 10.6), 0.0, "worse"),
        ((12, 13, 14), (9, 10, 11), 0.05, "better"),
        ((10.9, 13, 14), (9, 10, 11), 0.05, "same"),
    ],
)
def test_worse_is_beyond_the_spread_and_the_tolerance(before, after, tolerance, verdict):
    (change,) = compare(bench(ours=before), bench(ours=after), tolerance).changes
    assert change.verdict == verdict
    assert change.ratio == after[1] / before[1]
    back = {"worse": "better", "better": "worse", "same": "same"}[verdict]
    assert compare(bench(ours=after), bench(ours=before), tolerance).changes[0].verdict == back


def test_times_and_bytes_of_a_measurement():
    slower = with_row(row("window", 16384, 1, 8192.0, 2.5, 8192 * 528))
    (change,) = compare(data(), slower).worse
    assert (change.row, change.what) == ("window, 16,384 tokens, batch 1", "time per token")
    bigger = with_row(row("window", 16384, 1, 8192.0, 1.75, 8192 * 1056))
    assert {one.what for one in compare(data(), bigger).worse} == {
        "KV cache",
        "peak memory, prefill",
        "peak memory, decode",
    }
    assert len(compare(bigger, data()).better) == 3


def test_what_no_longer_fits_is_worse_and_what_now_fits_is_better():
    out = lost(data(), ("plain", 16384))
    found = compare(data(), out)
    assert {(one.row, one.what) for one in found.worse} == {
        (f"plain, 16,384 tokens, batch {batch}", what)
        for batch in (1, 8)
        for what in ("time to first token", "time per token")
    }
    assert str(found.worse[0].after) == "does not fit"
    assert len(compare(out, data()).better) == 4
    assert not compare(out, out).worse


def test_missing_and_new_rows_are_said():
    fewer = data()
    fewer["rows"] = [one for one in fewer["rows"] if one["batch"] == 1]
    found = compare(data(), fewer)
    assert found.missing == [
        f"{name}, {context} tokens, batch 8"
        for context in ("1,024", "16,384")
        for name in ("plain", "window")
    ]
    assert compare(fewer, data()).new == found.missing
    assert not found.worse


def test_benchmarks_compare_too():
    found = compare(
        bench(
            ours=(9, 10, 11), sdpa=(9, 10, 11), gone=(9, 10, 11), flex={"absent": "not installed"}
        ),
        bench(ours={"wrong": "off by 3"}, sdpa=(9, 10, 11), flex=(9, 10, 11)),
    )
    assert [(one.row, str(one.after)) for one in found.worse] == [("forward: ours", "wrong result")]
    assert found.missing == ["forward: gone"]
    assert found.new == ["forward: flex"]


def test_benchmarks_of_two_versions_are_refused():
    with pytest.raises(ValueError, match="version: got None and 1"):
        compare(bench(ours=(1, 2, 3)), {**bench(ours=(1, 2, 3)), "version": 1})


def test_what_may_not_be_comparable_is_warned_of():
    other = copy.deepcopy(data())
    other["environment"]["device"] = "another device"
    other["model"]["dtype"] = "bfloat16"
    other["settings"]["variants"][1]["spec"] = "pattern=sliding(window=256)"
    warnings = compare(data(), other).warnings
    assert warnings == [
        "different devices: a device before, another device after",
        "different models (dtype): float32 before, bfloat16 after",
        "variant window: pattern=sliding(window=512) before, pattern=sliding(window=256) after",
    ]


# ---- the command
# -------------------------------------------------------------------------------------------------


def invoke(tmp_path, before, after, *options) -> tuple[int, str, str]:
    files = []
    for name, content in (("before.json", before), ("after.json", after)):
        files.append(str(tmp_path / name))
        if content is not None:
            (tmp_path / name).write_text(
                content if isinstance(content, str) else json.dumps(content)
            )
    result = CliRunner().invoke(app, ["compare", *files, *options])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_exit_code_is_for_ci(tmp_path):
    slower = with_row(row("window", 16384, 1, 8192.0, 2.5, 8192 * 528))
    code, out, _ = invoke(tmp_path, data(), slower)
    assert code == 1
    assert "1 of 40 numbers got worse" in out
    assert "Slower or bigger" in out
    (one,) = json.loads(out.splitlines()[-1])["worse"]
    assert one == {
        "row": "window, 16,384 tokens, batch 1",
        "what": "time per token",
        "before": "1.75 ms",
        "after": "2.5 ms",
        "ratio": 1.4286,
    }
    code, out, _ = invoke(tmp_path, data(), slower, "--tolerance", "0.5")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["worse"] == []


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ('{"kind": "mea', "is no JSON"),
        ("[1, 2]", "kind: got None"),
        (
            {"kind": "swap_backend"},
            "kind: got 'swap_backend', valid is a result of `effattn measure` or of a benchmark",
        ),
        ({**data(), "version": 0}, "from an older effattn"),
        ({**data(), "rows": [{"variant": "plain"}]}, "the file is damaged"),
        ({"kind": "bench_attention"}, "has no cases"),
        ({"kind": "bench_attention", "cases": {"x": {}}}, "lacks 'contenders'"),
        ({**data(), "version": 2}, "from a newer effattn"),
        (bench(ours=(1, 2, 3)), "valid is two of the same kind"),
        ({**data(), "rows": [row("other", 7, 1, 1.0, 1.0, 1)]}, "no row in common"),
    ],
)
def test_bad_files_are_one_line(before, message, tmp_path):
    code, out, err = invoke(tmp_path, before, data())
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_a_tolerance_is_a_share(tmp_path):
    code, _, err = invoke(tmp_path, data(), data(), "--tolerance", "-1")
    assert code == 2
    assert "tolerance: got -1.0" in err


def test_folders_with_a_report_are_results_too(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(data()))
    assert load(tmp_path) == load(tmp_path / "report.json")
