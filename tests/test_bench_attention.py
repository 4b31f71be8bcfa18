"""The benchmark's harness, at tiny sizes: wrong answers are not timed, the absent say why, results are kept."""

import json

import pytest
import torch
from effattn.kernels.flash import Blocks, Pattern, Window

from effattn.profiling import bench_attention as bench
from effattn.profiling import bench_contenders, bench_report
from effattn.profiling.bench_contenders import Absent, Case, Contender
from recipes.bench_attention import main

CPU = torch.device("cpu")
SMALL = (Contender("sdpa", Pattern()), Contender("ours", Window(back=16)), Contender("ours", Blocks(size=16)))


def small(what="forward", dtype="float32", contenders=SMALL, **sizes):
    return Case(what, dtype, 100, contenders, **{"heads": 4, "kv_heads": 2, "dim": 16, **sizes})


def results():
    return bench.resume(None, bench.settings(CPU, True))


@pytest.mark.parametrize("what", ["forward", "forward+backward", "decode"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_gets_a_row(what, dtype):
    case, shown = small(what, dtype), []
    done = bench.run([case], CPU, results(), 0.01, lambda name, found: shown.append((name, len(found["cases"]))))
    assert shown == [(case.name, 1)]
    rows = done["cases"][case.name]["contenders"]
    assert list(rows) == [contender.name for contender in SMALL]
    for row in rows.values():
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["rounds"] >= bench.LEAST
        assert 0 < row["error"] < 0.01
        assert ("gb_per_s" in row) == (what == "decode")
    assert done["environment"]["threads"] == torch.get_num_threads()
    assert done["cases"][case.name]["case"]["kv_heads"] == 2
    json.dumps(done, allow_nan=False)
    assert "ours window 16" in bench_report.case_table(case.name, done).markdown()
    assert json.loads(bench_report.summary(done))["wrong"] == []


@pytest.mark.parametrize("what", ["forward", "forward+backward"])
def test_a_wrong_answer_has_no_time(what, monkeypatch):
    def sees_one_more(contender, case, tokens, device):
        return lambda q, k, v: bench_contenders.flash.attention(q, k, v, Window(contender.pattern.back + 1))

    monkeypatch.setitem(bench_contenders.BUILDERS, "ours", sees_one_more)
    case = small(what, contenders=(Contender("ours", Window(back=16)),))
    done = bench.run([case], CPU, results(), 0.01)
    (row,) = done["cases"][case.name]["contenders"].values()
    assert list(row) == ["wrong"]
    assert "relative error" in row["wrong"]
    assert json.loads(bench_report.summary(done))["wrong"] == [f"{case.name}: ours window 16"]
    assert "relative error" in bench_report.case_table(case.name, done).markdown()


def test_a_wrong_gradient_has_no_time(monkeypatch):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    inner = bench_contenders.BUILDERS["ours"]

    def build(*args):
        call = inner(*args)
        return lambda q, k, v: call(q, k, Off.apply(v))

    monkeypatch.setitem(bench_contenders.BUILDERS, "ours", build)
    case = small("forward+backward", contenders=(Contender("ours", Window(back=16)),))
    with pytest.raises(ArithmeticError, match="wrong dv"):
        bench_contenders.prepare(case.contenders[0], case, case.inputs(100, CPU))


def test_the_absent_say_why(monkeypatch):
    def breaks(*args):
        raise NotImplementedError("no backward\nfor you")

    monkeypatch.setitem(bench_contenders.BUILDERS, "flex", breaks)
    window = Window(back=16)
    case = small(
        contenders=(Contender("flex", window), Contender("local-attention", window), Contender("sdpa", window))
    )
    rows = bench.run([case], CPU, results(), 0.01)["cases"][case.name]["contenders"]
    assert rows["flex window 16"] == {"absent": "NotImplementedError: no backward for you"}
    assert rows["sdpa window 16"] == {"absent": "it has dense attention only"}
    assert set(rows["local-attention window 16"]) == {"absent"}  # not installed, or not for grouped heads

    monkeypatch.setitem(bench_contenders.BUILDERS, "ours", breaks)
    with pytest.raises(NotImplementedError):  # ours is not excused
        bench_contenders.prepare(SMALL[1], small(), small().inputs(100, CPU))


def test_backends_of_sdpa_that_a_device_lacks_are_absent():
    kinds = [f"sdpa-{name}" for name in ("flash", "cudnn", "efficient")]
    case = small(dtype="bfloat16", contenders=tuple(Contender(kind, Pattern()) for kind in kinds), kv_heads=4)
    rows = bench.run([case], CPU, results(), 0.01)["cases"][case.name]["contenders"]
    assert "ms_p50" in rows["sdpa-flash dense"]
    assert "absent" in rows["sdpa-cudnn dense"]


def test_exact_windows_of_local_attention():
    pytest.importorskip("local_attention")
    case = small("forward+backward", contenders=(Contender("local-attention", Window(back=16)),), kv_heads=4)
    _, error = bench_contenders.prepare(case.contenders[0], case, case.inputs(100, CPU))
    assert error < 1e-5


def test_results_are_kept_and_not_mixed():
    first = bench.run([small()], CPU, results(), 0.01)
    before = json.dumps(first)
    again = bench.resume(json.loads(before), bench.settings(CPU, True))
    bench.run([small()], CPU, again, 0.01)
    assert json.dumps(again) == before
    with pytest.raises(ValueError, match="--fresh"):
        bench.resume(first, bench.settings(CPU, False))


def test_parts_are_all_of_it():
    cases = bench.gpu_cases()
    parts = [cases[index - 1 :: count] for index, count in map(bench.parse_part, ("1/3", "2/3", "3/3"))]
    assert sorted(case.name for part in parts for case in part) == sorted({case.name for case in cases})
    for text in ("0/3", "4/3", "3", "a/b", ""):
        with pytest.raises(ValueError, match="part"):
            bench.parse_part(text)
    decoded = [case for case in cases if case.what == "decode"]
    assert all(case.kv_bytes() >= 2**28 for case in decoded)  # and several of them in turn


def test_targets_refer_to_cases_that_are_run():
    names = {case.name: {contender.name for contender in case.contenders} for case in bench.cpu_cases()}
    for _, case, slow, fast, _ in bench_report.TARGETS:
        assert {slow, fast} <= names[case]
    timed = {"contenders": {}}
    fake = {
        "cases": {name: {"contenders": {who: {"ms_p50": 7.0} for who in found}} for name, found in names.items()},
        "memory": {"ours window 512 forward": {"32768": 40, "8192": 10}},
    }
    found = bench_report.checks(fake)
    assert [row["value"] for row in found] == [1.0] * 9 + [4.0]
    assert [row["passes"] for row in found] == [False, True, True, False, False, False, True, True, True, True]
    assert {row["passes"] for row in bench_report.checks({"cases": dict.fromkeys(names, timed)})} == {None}


def test_memory_of_a_call_grows_with_what_it_holds():
    few, many = (bench.peak_memory(Window(back=512), tokens, False) for tokens in (8192, 16384))
    assert 8192 * 8 * 64 * 4 <= few < many < 16384 * 8 * 4 * 1024  # at least the output; far from (T, T)


def test_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "cpu_cases", lambda quick: [small(), small(dtype="float64")])
    output = tmp_path / "new" / "attention.json"
    options = dict(output=output, device="cpu", quick=True, seconds=0.01, threads=None, fresh=False)
    main(**options, part="1/2")
    assert len(json.loads(output.read_text())["cases"]) == 1
    main(**options, part="2/2")
    saved = json.loads(output.read_text())
    assert len(saved["cases"]) == 2
    assert saved["settings"]["threads"] == torch.get_num_threads()
    assert {row["passes"] for row in saved["checks"]} == {None}
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["cases"] == 2
    assert [file.name for file in output.parent.iterdir()] == ["attention.json"]


def test_a_gpu_run_begins_with_the_tests(tmp_path):
    with pytest.raises(RuntimeError, match="not found"):
        bench.run_tests([tmp_path / "test_x.py"])
    (tmp_path / "test_x.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(RuntimeError, match="nothing is timed"):
        bench.run_tests([tmp_path / "test_x.py"])
    (tmp_path / "test_x.py").write_text("def test_it():\n    pass\n")
    bench.run_tests([tmp_path / "test_x.py"])


def test_read_bandwidth_is_a_number_of_bytes():
    assert 1e8 < bench.read_bandwidth(CPU, 2**24) < 1e13


def test_absent_is_no_error_of_ours():
    assert not issubclass(Absent, (ValueError, RuntimeError))
