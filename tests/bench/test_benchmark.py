"""The benchmark's engine, at tiny sizes: wrong answers are not timed, the absent say why, results
are kept.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import typer

import effattn
from bench import attention, growth, measure, page, report, results, run
from bench.attention import ours, peer, race
from bench.case import Absent, Contender, Defined, Entry, Ratio, Target
from bench.peers import PEERS
from bench.rows import monarch, packed_decode, whole_steps
from effattn.profiling.device import Peaks
from recipes.bench import main

CPU = torch.device("cpu")
WINDOW = "sliding(window=16)"
PEAKS = Peaks(
    "a CPU", "cpu", 1, "2026-01-01", {}, 1e10, 2e10, 1e10, {"float32": 1e11, "bfloat16": 1e9}, 1e-6
)
SMALL = (peer("SDPA", "dense"), ours(WINDOW), ours("block(block=16)"))


def small(what="forward", dtype="float32", contenders=SMALL, tokens=100, **sizes):
    return race(what, dtype, tokens, contenders, **{"heads": 4, "kv_heads": 2, "dim": 16, **sizes})


def new(quick=False):
    return results.new(results.settings(CPU, quick, 0.01))


def measured(case):
    return measure.measure(case, CPU, 0.01, PEAKS)["contenders"]


@pytest.mark.parametrize("what", ["forward", "forward+backward", "decode", "step"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_gets_a_row(what, dtype):
    contenders = SMALL if what != "step" else (peer("DynamicCache+SDPA", "dense"), *SMALL[1:])
    case, shown = small(what, dtype, contenders), []
    done = run.run(
        [case],
        CPU,
        new(),
        0.01,
        PEAKS,
        lambda name, found: shown.append((name, len(found["cases"]))),
    )
    assert shown == [(case.name, 1)]
    rows = done["cases"][case.name]["contenders"]
    assert list(rows) == [contender.name for contender in contenders]
    for row in rows.values():
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert measure.LEAST <= row["rounds"] <= measure.MOST
        assert 0 < row["error"] < 0.01
        # at least the output
        assert row["peak_bytes"] >= 4 * 16 * (1 if what in ("decode", "step") else 100) * 2
        assert row["limit_ms"] > 0
        assert row["read_share"] > 0
    assert [row["ours"] for row in rows.values()] == [False, True, True]
    assert done["cases"][case.name]["case"]["kv_heads"] == 2
    assert f"effattn {WINDOW}" in report.case_table(case.name, done).markdown()
    json.dumps(run.judge(done), allow_nan=False)
    assert json.loads(report.summary(done))["wrong"] == []


@pytest.mark.parametrize("what", ["forward", "forward+backward", "decode", "step"])
def test_a_wrong_answer_has_no_time(what):
    # sees one key more than it should
    off = replace(ours("sliding(window=17)"), truth=ours(WINDOW).truth)
    case = small(what, contenders=(off, ours(WINDOW)), tokens=128)
    done = run.judge(run.run([case], CPU, new(), 0.01))
    wrong, right = done["cases"][case.name]["contenders"].values()
    assert set(wrong) == {"ours", "wrong"}
    assert "relative error" in wrong["wrong"]
    assert "ms_p50" in right
    assert json.loads(report.summary(done))["wrong"] == [f"{case.name}: {off.name}"]
    assert run.faults(done) == [f"{case.name}: {off.name}: {wrong['wrong']}"]
    assert "relative error" in report.case_table(case.name, done).markdown()


def test_a_wrong_gradient_has_no_time():
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    def build(case, inputs):
        call = ours(WINDOW).build(case, inputs)
        return lambda q, k, v: call(q, k, Off.apply(v))

    case = small("forward+backward", contenders=(replace(ours(WINDOW), build=build),))
    with pytest.raises(ArithmeticError, match="dv: relative error"):
        measure.prepare(case.contenders[0], case, case.inputs(100, CPU))


@pytest.mark.parametrize("rows", [packed_decode, whole_steps])
@pytest.mark.parametrize("spec", packed_decode.FORMATS)
def test_every_packed_format_is_right(rows, spec):
    """Also those that keep first tokens in full precision by default."""
    case = next(case for case in rows.cases("cpu", quick=True) if case.title == "packed")
    ours = next(one for one in case.contenders if one.name == f"effattn {spec}")
    inputs = case.inputs(case.tokens, CPU)
    call = ours.build(case, inputs)
    right = ours.truth(case, inputs, call)["output"]
    assert (call(*inputs) - right).norm() < 1e-4 * right.norm()


def test_an_answer_that_is_not_finite_is_wrong():
    case = small(
        contenders=(
            replace(ours(WINDOW), build=lambda case, inputs: lambda q, k, v: q * torch.nan),
        )
    )
    assert "wrong" in measured(case)[f"effattn {WINDOW}"]


def test_the_absent_say_why():
    def breaks(case, inputs):
        raise NotImplementedError("no backward\nfor you")

    broken = replace(peer("flex_attention", WINDOW), build=breaks)
    rows = measured(
        small(contenders=(broken, peer("local-attention", WINDOW), peer("SDPA", WINDOW)))
    )
    assert rows[f"flex_attention {WINDOW}"]["absent"] == "NotImplementedError: no backward for you"
    assert rows[f"SDPA {WINDOW}"]["absent"] == "it has dense attention only"
    assert "absent" in rows[f"local-attention {WINDOW}"]  # not installed, or not for grouped heads
    with pytest.raises(NotImplementedError):  # ours is not excused
        measured(small(contenders=(replace(ours(WINDOW), build=breaks),)))
    assert not issubclass(Absent, (ValueError, RuntimeError))


def test_methods_without_a_predicate_are_held_to_their_own_reference(monkeypatch):
    monkeypatch.setattr(attention, "CHECKED", 32)
    monkeypatch.setattr(
        effattn.backends()["sliding"],
        "traits",
        replace(effattn.backends()["sliding"].traits, exact=False),
    )
    lengths = []

    def build(case, inputs):
        lengths.append(inputs[0].shape[2])
        return ours(WINDOW).build(case, inputs)

    for what in ("forward", "forward+backward"):
        lengths.clear()
        row = measured(small(what, contenders=(replace(ours(WINDOW), build=build),)))[
            f"effattn {WINDOW}"
        ]
        assert lengths == [32, 100]  # checked at one length, timed at the other
        assert 0 < row["error"] < 1e-5
    off = replace(ours("sliding(window=15)"), truth=ours(WINDOW).truth)
    assert "wrong" in measured(small(contenders=(off,)))[off.name]


def test_a_slow_call_does_not_take_the_others_rounds():
    takes = {"long": 5.0, "slow": 2.0, "quick": 0.001}
    calls = {name: (lambda name=name: name) for name in takes}
    times = measure.rounds(calls, lambda call: takes[call()], seconds=4.0)
    assert {name: set(times[name]) for name in calls} == {name: {takes[name]} for name in calls}
    assert {name: len(times[name]) for name in calls} == {
        "long": 2,
        "slow": measure.LEAST,
        "quick": measure.MOST,
    }


@pytest.mark.parametrize("what", [monarch.FORWARD, monarch.TRAINING])
def test_monarch_products(what, monkeypatch):
    monkeypatch.setattr(monarch, "WIDTH", 64)
    case = replace(monarch._race(what, 5, "cpu"), contenders=())
    dense = monarch._race(what, 5, "cpu").contenders[0]
    butterfly = Contender(
        "b",
        partial(monarch._monarch, "monarch(blocks=8)"),
        monarch._truth,
        True,
        "monarch(blocks=8)",
    )
    rows = measured(replace(case, contenders=(dense, butterfly)))
    assert [row["error"] < 1e-5 for row in rows.values()] == [True, True]
    mine, theirs = rows["b"], rows[dense.name]
    assert mine["flops"] < theirs["flops"] / 3
    if what == monarch.FORWARD:
        assert (theirs["read_bytes"], theirs["write_bytes"]) == (4 * (64 * 64 + 5 * 64), 4 * 5 * 64)
        found = {"cases": {"c": {"contenders": rows}}}
        assert monarch.Moved("c", dense.name)(found) == 1
        assert monarch.Moved("c", "b")(found) > 1  # torch writes the numbers between the products
        assert monarch.Moved("c", "none")(found) is None
    wrong = replace(butterfly, truth=lambda case, x, call: {"output": 2 * x[0].double()})
    assert "wrong" in measured(replace(case, contenders=(wrong,)))["b"]


def test_a_peer_may_say_itself_what_is_right():
    def build(case, inputs):
        return Defined(lambda q, k, v: 2 * v, lambda q, k, v: gain * v)

    case = small(
        "forward+backward", contenders=(replace(peer("SDPA", "dense"), build=build),), kv_heads=4
    )
    gain, name = 2, "SDPA dense"
    assert measured(case)[name]["error"] == 0
    gain = 2.01
    assert "relative error" in measured(case)[name]["wrong"]


def test_remarks_stand_below_the_table():
    done = run.run([small(remark="Theirs does less.")], CPU, new(), 0.01)
    assert "Theirs does less." in report.case_table(small().name, done).markdown()


def test_limits_are_those_of_the_fastest_type_that_serves():
    (row,) = measured(small(dtype="bfloat16", contenders=(ours("dense"),))).values()
    assert row["limit_ms"] == pytest.approx(
        1000 * max(row["flops"] / 1e11, row["read_bytes"] / 2e10)
    )
    assert row["limit_share"] == pytest.approx(row["limit_ms"] / row["ms_p50"])


# Growth and targets
# -------------------------------------------------------------------------------------------------


def test_exponents():
    lengths = [1000, 2000, 5000]
    assert growth.exponent(lengths, [3 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert growth.exponent(lengths, [7, 7, 7]) == pytest.approx(0)
    assert growth.exponent([1000, 2000], [1, 2]) is None
    assert growth.exponent(lengths, [0, 1, 2]) is None


def test_growth_beyond_what_is_declared_fails_the_check():
    lengths = (1024, 2048, 4096)
    case = attention.growth("dense", 1, 1, lengths, heads=2, kv_heads=2, dim=16)
    done = run.judge(run.run([case], CPU, new(), 0.01))
    time, memory = done["growth"]
    rows = done["cases"][case.name]["contenders"]
    # times as clean as a quiet machine's
    for row, tokens in zip(rows.values(), lengths, strict=True):
        row["ms_p50"] = tokens**1.2
    assert [row["of"] for row in (time, memory)] == ["time", "memory"]
    assert 0 <= memory["measured"] < 1.15
    run.judge(done)
    assert done["growth"][0]["measured"] == pytest.approx(1.2)
    assert "time grows with exponent 1.20, declared 1" in run.faults(done)[0]
    assert "grows faster" in report.growth_table(done).markdown()
    assert "exceed" in report.finding(done)
    done["settings"]["quick"] = True  # its lengths say nothing
    assert run.faults(run.judge(done)) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_backend_declares_its_growth(device):
    grown = [case for case in run.all_cases(device) if case.declared]
    assert {effattn.backend(case.contenders[0].spec).name for case in grown} == set(
        effattn.backends()
    )
    assert all(len(case.contenders) >= 3 for case in grown)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_refer_to_what_is_raced(device):
    cases = {
        case.name: {"case": case.described(), "contenders": {}} for case in run.all_cases(device)
    }
    for case in run.all_cases(device):
        for one in case.contenders:
            numbers = {
                "ms_p20": 1.0,
                "ms_p50": 7.0,
                "ms_p80": 9.0,
                "peak_bytes": 5,
                "read_share": 0.9,
                "read_bytes": 8,
                "write_bytes": 4,
            }
            cases[case.name]["contenders"][one.name] = {"ours": one.ours, **numbers}
    full = [target.judge({"cases": cases}) for target in run.all_targets(device)]
    assert len(full) >= 20
    assert None not in [row["passes"] for row in full]
    assert {row["passes"] for row in [t.judge({"cases": {}}) for t in run.all_targets(device)]} == {
        None
    }


def test_targets_are_judged():
    rows = {"cases": {"c": {"contenders": {"slow": {"ms_p50": 12.0}, "fast": {"ms_p50": 4.0}}}}}
    ratio = Ratio(("c", "slow"), ("c", "fast"))
    met = Target("x", ratio, "someone", least=3, headline="{value}x as fast").judge(rows)
    assert (met["value"], met["passes"], met["headline"]) == (3.0, True, "3x as fast")
    assert Target("x", ratio, "someone", most=2.9).judge(rows)["passes"] is False
    assert (
        Target("x", Entry(("c", "none"), "ms_p50"), "someone", most=1).judge(rows)["passes"] is None
    )


# The run
# -------------------------------------------------------------------------------------------------


def test_results_are_kept_and_not_mixed(tmp_path):
    file = tmp_path / "new" / "bench.json"
    wanted = results.settings(CPU, False, 0.01)
    first = run.run([small()], CPU, results.resume(file, wanted), 0.01)
    results.save(file, first, "<html>")
    again = results.resume(file, wanted)
    assert again == json.loads(json.dumps(first))
    run.run([small()], CPU, again, 0.01)
    assert again["cases"] == json.loads(json.dumps(first["cases"]))
    assert sorted(found.name for found in file.parent.iterdir()) == ["bench.html", "bench.json"]
    with pytest.raises(ValueError, match=r"quick: False, now True.*--fresh"):
        results.resume(file, results.settings(CPU, True, 0.01))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kind": "bench", "cases"', "not JSON"),
        ("[1]", "kind 'list'"),
        ('{"kind": "other"}', "valid is 'bench'"),
        ('{"kind": "bench", "version": 0}', "version 0, this is version 1"),
        ('{"kind": "bench", "version": 1, "settings": {}, "cases": {"a": 1}}', "damaged"),
        ("\udcff", "not JSON"),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path, text, said):
    file = tmp_path / "bench.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=said) as caught:
        results.resume(file, results.settings(CPU, True, 0.01))
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == text.encode(errors="surrogateescape")


def test_parts_are_all_of_it_and_only_is_a_part_of_a_name():
    cases = run.all_cases("cuda")
    parts = [run.choose(cases, None, run.parse_part(f"{index}/3")) for index in (1, 2, 3)]
    assert sorted(case.name for part in parts for case in part) == sorted(
        case.name for case in cases
    )
    assert {case.what for case in run.choose(cases, "decode")} == {"decode"}
    with pytest.raises(ValueError, match="did you mean"):
        run.choose(cases, "forwad")
    for text in ("0/3", "4/3", "3", "a/b", ""):
        with pytest.raises(ValueError, match="part"):
            run.parse_part(text)
    decoded = [case for case in cases if case.what == "decode"]
    assert all(
        case.sets(torch.device("cuda")) * case.cost(case.contenders[0]).read_bytes >= 2**30
        for case in decoded
    )


def test_the_plan_knows_what_is_left():
    cases = [small(), small(dtype="float64")]
    planned = run.plan(cases, {"cases": {cases[0].name: {}}}, PEAKS, 4.0)
    assert list(planned) == [cases[1].name]
    assert 0 < planned[cases[1].name] < 4
    assert "2 parts" in run.say({"a": 600.0, "b": 400.0}, 3)
    assert "3 are measured" in run.say({"a": 600.0}, 3)
    dense = race("forward", "float32", 16384, [ours("dense")])
    pairs = 16384 * 16385 / 2 * 8
    assert measure.estimate(dense, PEAKS, 0.0) == pytest.approx(
        4 * 4 * 64 * pairs / 1e11 / 0.4 + 0.2, rel=0.01
    )
    pairs /= 16  # below measure.LONG, for three rounds
    short = race("forward", "float32", 4096, [ours("dense")])
    assert measure.estimate(short, PEAKS, 0.0) == pytest.approx(
        6 * 4 * 64 * pairs / 1e11 / 0.4 + 0.2, rel=0.01
    )


def test_a_gpu_run_begins_with_the_tests(tmp_path):
    with pytest.raises(RuntimeError, match="not found"):
        run.run_tests([tmp_path / "test_x.py"])
    (tmp_path / "test_x.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(RuntimeError, match="nothing is timed"):
        run.run_tests([tmp_path / "test_x.py"])
    (tmp_path / "test_x.py").write_text("def test_it():\n    pass\n")
    run.run_tests([tmp_path / "test_x.py"])


OPTIONS = dict(
    device="cpu", quick=False, seconds=0.01, threads=None, fresh=False, only=None, plan=False
)


@pytest.fixture
def recipe(monkeypatch):
    """The recipe with two small cases and no measuring of the device."""
    rising = attention.growth(WINDOW, 1, 1, (64, 128, 256), heads=2, kv_heads=2, dim=16)
    monkeypatch.setattr(
        run, "all_cases", lambda device, quick=False: [small(), small(tokens=200), rising]
    )
    monkeypatch.setattr("effattn.profiling.device.peaks", lambda *args, **options: PEAKS)
    threads = torch.get_num_threads()

    def call(output, **options):
        main(output=output, **{**OPTIONS, "part": "1/1", **options})

    yield call
    torch.set_num_threads(threads)


def test_the_recipe_goes_on_and_makes_a_page(tmp_path, recipe, capsys):
    output = tmp_path / "new" / "bench.json"
    recipe(output, part="1/3")
    assert len(json.loads(output.read_text())["cases"]) == 1
    kept = json.loads(output.read_text())["cases"]
    recipe(output, part="2/3")
    saved = json.loads(output.read_text())
    assert len(saved["cases"]) == 2
    assert saved["cases"] | kept == saved["cases"]
    assert saved["kind"] == "bench"
    assert saved["peaks"] == PEAKS.to_dict()
    assert set(saved["peers"]) == set(PEERS)
    assert saved["environment"]["threads"] == torch.get_num_threads()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["cases"] == 2
    shown = output.with_suffix(".html").read_text()
    assert "<svg" in shown
    assert "no row yet" in shown
    assert "No target was measured" in shown


def test_the_recipe_refuses_in_one_line(tmp_path, recipe, capsys):
    def refused(said, output=tmp_path / "bench.json", **options):
        with pytest.raises(typer.Exit) as caught:
            recipe(output, **options)
        assert caught.value.exit_code == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert "Traceback" not in shown.err

    if not torch.cuda.is_available():
        refused("torch sees 0 GPUs", device="cuda")
    refused("part: got '4/3'", part="4/3")
    refused("got 'lash'", only="lash")
    refused("threads: got 0", threads=0)
    refused("seconds: got -1", seconds=-1.0)
    (tmp_path / "file").write_text("")
    refused("file", output=tmp_path / "file" / "bench.json")
    (tmp_path / "bench.json").write_text("{")
    refused("not JSON")
    assert (tmp_path / "bench.json").read_text() == "{"
    recipe(tmp_path / "bench.json", fresh=True, only="T200")
    assert len(json.loads((tmp_path / "bench.json").read_text())["cases"]) == 1
    recipe(tmp_path / "other.json", plan=True)
    assert not (tmp_path / "other.json").exists()


def test_the_recipe_fails_after_everything_is_written(tmp_path, recipe, monkeypatch):
    steep = attention.growth(WINDOW, -1, 1, (64, 128, 256), heads=2, kv_heads=2, dim=16)
    monkeypatch.setattr(run, "all_cases", lambda device, quick=False: [steep])
    with pytest.raises(SystemExit) as caught:
        recipe(tmp_path / "bench.json")
    assert caught.value.code == 1
    assert json.loads((tmp_path / "bench.json").read_text())["growth"][0]["passes"] is False
    assert (tmp_path / "bench.html").is_file()


def test_plots_need_two_lengths():
    done = run.run([small(), small(tokens=200), small("decode")], CPU, new(), 0.01)
    done |= {"growth": [], "checks": []}
    assert "2,00" not in page.plot_of_group(done, small().group)[0]
    assert page.plot_of_group(done, small("decode").group) == []
    assert page.html(done).count("<svg") == 1
