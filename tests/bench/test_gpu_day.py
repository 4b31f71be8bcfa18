"""A day with a rented GPU, without one: processes and their limits, what is resumed, every launch
on a GPU that is not there, kernels that are compiled here and found there, and the tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.day import (
    carried,
    correctness,
    headlines,
    jobs,
    page,
    profiler,
    ratios,
    steps,
    summary,
    tuning,
)
from bench.day.jobs import DONE, FAILED, LATE, WAITING, Job
from bench.day.settings import Day

ROOT = Path(__file__).parents[2]
REPORTING = """
import json, os, sys, time
def report(found):
    with open(os.environ["EFFATTN_DAY_REPORT"], "a") as file:
        file.write(json.dumps(found) + "\\n")
"""


def job(name: str, code: str, seconds: float = 20.0) -> Job:
    return Job(name, (sys.executable, "-S", "-c", REPORTING + code), seconds)


def outcomes(*some: Job, workers: int = 4, seconds: float = 30.0) -> dict[str, jobs.Outcome]:
    found = jobs.run(some, workers, time.monotonic() + seconds, interval=0.01)
    return {one.name: one for one in found}


# ---- processes


def test_what_a_job_reported_stays_however_it_ends():
    found = outcomes(
        job("good", "report({'a': 1}); report({'a': 2})"),
        job("bad", "report({'a': 3}); print('why'); sys.exit(3)"),
        job("slow", "report({'a': 4}); time.sleep(60)", seconds=1.5),
    )
    assert {name: one.status for name, one in found.items()} == {
        "good": DONE,
        "bad": FAILED,
        "slow": LATE,
    }
    assert [row["a"] for row in found["good"].results] == [1, 2]
    assert found["bad"].results == [{"a": 3}]
    assert found["bad"].code == 3
    assert found["bad"].tail == "why"
    assert found["slow"].results == [{"a": 4}]
    assert 1.4 < found["slow"].seconds < 15


def test_when_the_time_is_over_the_rest_is_said_to_wait():
    many = [job(str(i), "time.sleep(60)") for i in range(3)]
    begun = time.monotonic()
    found = outcomes(*many, workers=1, seconds=1.0)
    assert time.monotonic() - begun < 15
    assert [one.status for one in found.values()] == [LATE, WAITING, WAITING]


def test_children_end_with_their_job(tmp_path):
    """A job's own processes, such as those of a compiler, do not outlive it."""
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); "
    outcomes(job("parent", code + "time.sleep(60)", seconds=1.0))
    time.sleep(3.2)
    assert not mark.exists()


def test_one_at_a_time_has_the_device(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.LOCK, str(tmp_path / "lock"))
    code = "from bench.day.jobs import alone\nimport sys\nwith alone(): print('in', flush=True)"
    with jobs.alone():
        other = subprocess.Popen(
            [sys.executable, "-S", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.5)
    assert other.communicate(timeout=30)[0] == "in\n"


# ---- a checkout without an install


def test_the_checkout_is_found_without_an_install():
    """`effattn.kernels` is `kernels/`: in a Python that has no site-packages."""
    code = (
        "import sys, sitecustomize; finder = sys.meta_path[0];"
        "print(*sorted(finder.folders));"
        "print(finder.find_spec('effattn.kernels').origin, finder.find_spec('effattn.hf'))"
    )
    env = {**os.environ, "PYTHONPATH": str(steps.SITE)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    names, found = done.stdout.splitlines()
    assert names.split() == [f"effattn.{x}" for x in ("kernels", "prune", "quant", "recipes")]
    assert found == f"{ROOT / 'kernels' / '__init__.py'} None"


# ---- steps


class Module:
    """A step's module, of which jobs are lines of Python."""

    def __init__(self, codes: dict[str, str]):
        self.codes = codes

    def names(self, day):
        if not self.codes:
            raise RuntimeError("nothing to import")
        return list(self.codes)


def fake_steps(monkeypatch, **modules: Module) -> None:
    made = tuple(steps.Step(name, name, 20, 4, 20) for name in modules)
    monkeypatch.setattr(steps, "STEPS", made)
    monkeypatch.setattr(steps.Step, "load", lambda self: modules[self.name])
    monkeypatch.setattr(
        steps, "_job", lambda step, name, day: job(name, modules[step.name].codes[name])
    )


def test_a_day_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    day, runs = Day("cpu", True, tmp_path / "day"), tmp_path / "runs"
    count = f"open({str(runs)!r}, 'a').write('x'); report({{'n': 1}})"
    fake_steps(
        monkeypatch,
        first=Module({"good": count, "bad": count + "; sys.exit(1)"}),
        broken=Module({}),
        last=Module({"also": count}),
    )
    found = steps.go(day, 60, tmp_path)
    assert runs.read_text() == "xxx"
    assert {name: one["status"] for name, one in found["first"]["jobs"].items()} == {
        "good": DONE,
        "bad": FAILED,
    }
    assert found["broken"]["failed"] == "RuntimeError: nothing to import"
    assert found["last"]["jobs"]["also"]["results"] == [{"n": 1}]
    kept = json.loads((tmp_path / "day" / "first.json").read_text())
    assert kept["jobs"]["bad"]["results"] == [{"n": 1}]

    steps.go(day, 60, tmp_path)
    assert runs.read_text() == "xxxx"  # only what was not done
    (tmp_path / "day" / "last.json").write_text("{")  # cut off
    steps.go(day, 60, tmp_path, only=("last",))
    assert runs.read_text() == "xxxxx"
    monkeypatch.setattr(steps, "key", lambda day: {"sources": "others"})
    steps.go(day, 60, tmp_path, only=("first",))
    assert runs.read_text() == "xxxxxxx"  # of other sources nothing stands


def test_no_time_is_no_failure(tmp_path, monkeypatch):
    fake_steps(monkeypatch, first=Module({"a": "pass"}))
    found = steps.go(Day("cpu", True, tmp_path), 0, tmp_path)
    assert found["first"]["jobs"]["a"]["status"] == WAITING


def test_limits_add_up():
    assert sum(step.seconds for step in steps.STEPS) <= steps.TOTAL
    assert all(step.longest <= step.seconds for step in steps.STEPS)


# ---- correctness


def doubled(wrong: float):
    def call(impl, x):
        return {"out": 2 * x["x"] + (wrong if impl == "triton" else 0.0)}

    return correctness.Check(call, {"x": (4, 8)}, "x")


def test_a_wrong_kernel_is_found_and_a_right_one_is_right():
    cpu = torch.device("cpu")
    right = correctness.judge(doubled(0.0), cpu, torch.float32)
    assert right["right"]
    assert set(right["errors"]) == {"out", "dx"}
    wrong = correctness.judge(doubled(0.1), cpu, torch.float32)
    assert not wrong["right"]
    assert wrong["errors"]["out"][0] > wrong["errors"]["out"][2]
    assert not correctness.judge(doubled(float("nan")), cpu, torch.float32)["right"]


def test_a_kernel_that_multiplies_fp16_as_bf16_is_judged_as_bf16():
    def call(impl, x):
        return {
            "y": (2 * x["x"].to(torch.bfloat16 if impl == "triton" else x["x"].dtype)).to(x["x"])
        }

    for ranged in (True, False):
        check = correctness.Check(call, {"x": (64, 8)}, ranged=ranged)
        assert correctness.judge(check, torch.device("cpu"), torch.float16)["right"] == ranged


def test_what_raises_is_a_line_and_the_others_go_on(monkeypatch):
    def raising(impl, x):
        raise RuntimeError("no such tile")

    some = [("a", correctness.Check(raising, {"x": (1,)})), ("b", doubled(0.0))]
    monkeypatch.setattr(correctness, "checks", lambda name, day: (some, torch.float32))
    before = torch.are_deterministic_algorithms_enabled()
    found = list(correctness.run("any", Day("cpu", True)))
    torch.use_deterministic_algorithms(before)
    assert [row["right"] for row in found] == [False, True]
    assert found[0]["failed"] == "RuntimeError: no such tile"


@pytest.mark.parametrize("group", ["decode", "packed"])
def test_checks_run_in_the_interpreter(group):
    """One of each group, as the day runs them; the tests of each kernel do the rest."""
    found, _ = correctness.checks(f"{group} bf16", Day("cpu", True))
    judged = correctness.judge(found[0][1], torch.device("cpu"), torch.bfloat16)
    assert judged["right"], judged


# ---- headlines, and what is made of them


def test_every_headline_is_a_row_of_the_benchmark():
    for one in ratios.HEADLINES:
        case = headlines.cases()[one.case]
        names = {each.name for each in case.contenders}
        assert {one.of, one.over} - {""} <= names
        if not one.over:
            assert case.cost(next(x for x in case.contenders if x.name == one.of)).read_bytes
    for where, who in tuning.TUNED.values():
        assert who in {each.name for each in headlines.cases()[where].contenders}


def results(ms: dict[str, float], **more) -> dict:
    """headlines.json of one case."""
    one = ratios.HEADLINES[2]
    rows = {who: {"ours": True, "ms_p50": value, **more} for who, value in ms.items()}
    row = {"name": one.case, "contenders": rows, "kernels": {"attend": 3}, "found": 2}
    row["compiled"] = {"combine": 1}
    return {"jobs": {one.case: {"status": DONE, "seconds": 1.0, "results": [row]}}}


def test_ratios_are_of_speed_and_the_worst_is_profiled(tmp_path):
    share, _, against = ratios.HEADLINES[:3]
    found = results({against.of: 2.0, against.over: 3.0}, read_share=0.4)
    cases = {"cases": {name: x["results"][0] for name, x in found["jobs"].items()}}
    assert against.value(cases) == 1.5
    assert share.value(cases) == 0.4
    assert ratios.HEADLINES[3].value(cases) is None
    day = Day("cuda", False, tmp_path)
    assert profiler.worst(day) is None
    (tmp_path / "headlines.json").write_text(json.dumps(found))
    assert profiler.worst(day) == (share.case, share.of, ["attend"])


def test_tables_say_what_is_known_and_what_is_not():
    against = ratios.HEADLINES[2]
    found = {"headlines": results({against.of: 2.0, against.over: 3.0}, host_ms=0.1)}
    line = next(x for x in summary.headlines_table(found).rows if x[0] == against.what)
    assert line[1:5] == ["1.50", "1.00", "yes", "-"]
    assert line[7] == "0.1"
    checks = [
        {"what": "full", "errors": {"out": [0.3, 0.001, 0.004]}, "right": False},
        {"what": "window", "failed": "RuntimeError: x", "right": False},
        {"what": "sinks", "errors": {"out": [0.001, 0.001, 0.004]}, "right": True},
    ]
    found["correctness"] = {"jobs": {"flash": {"status": LATE, "seconds": 2.0, "results": checks}}}
    text = summary.text(found)
    assert "flash out of time" in text
    assert text.startswith("on a device that was not asked for its name\n")
    row = {"environment": {"device": "Some GPU"}}
    found["versions"] = {"jobs": {"versions": {"status": DONE, "seconds": 1, "results": [row]}}}
    found["versions"]["key"] = {"tiny": True}
    assert summary.text(found).startswith("on Some GPU, tiny sizes: its numbers say nothing\n")
    assert "1 of 3" in text
    assert "flash: full: out 3.0e-01 (plain torch 1.0e-03)" in text
    assert "flash: window: RuntimeError: x" in text
    assert "2 found in the cache, 1 compiled" in text
    assert len(text) <= summary.LONGEST
    assert "kernels of the headlines: 0 found" in summary.text({})


def test_the_documentation_shows_predictions_without_results_and_both_with_them(tmp_path):
    text = "a\n<!-- day:some-gpu -->\nold\n<!-- /day -->\nb\n"
    empty = page.update(text, tmp_path)
    assert "*Not measured yet: `make gpu-day`" in empty
    assert re.search(r"\| decode int8 against bf16 \| - \| 1\.70 \|  \| [a-z ]*\d", empty)
    assert page.update(empty, tmp_path) == empty
    folder = tmp_path / "results" / "some-gpu" / "gpu_day"
    folder.mkdir(parents=True)
    against = ratios.HEADLINES[2]
    measured = results({against.of: 2.0, against.over: 3.0}, limit_ms=1.0)
    (folder / "headlines.json").write_text(json.dumps(measured))
    where = {"device": "Some GPU", "torch": "2", "triton": "3", "date": "2026-12-01T10:00"}
    told = {"jobs": {"versions": {"results": [{"python": "3"}, {"environment": where}]}}}
    (folder / "versions.json").write_text(json.dumps(told))
    full = page.update(empty, tmp_path)
    assert f"| {against.what} | 1.50 | 1.00 | yes | - | 2 | 1 | - |" in full
    assert "<sub>Some GPU; torch 2, triton 3; 2026-12-01; `results/some-gpu/gpu_day`</sub>" in full
    assert "Not measured yet" not in full
    with pytest.raises(ValueError, match="marker"):
        page.update("<!-- day:some-gpu -->", tmp_path)


def test_a_long_report_is_cut():
    checks = [{"what": "w" * 5000, "failed": "f" * 5000, "right": False}] * 3
    found = {"correctness": {"jobs": {"x": {"status": DONE, "seconds": 1, "results": checks}}}}
    assert len(summary.text(found)) == summary.LONGEST


# ---- GPUs that are not there


def elsewhere(code: str, **env: str) -> dict:
    """What a process prints last, as JSON, in which Triton compiles."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join((str(steps.SITE), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.launch
def test_all_that_a_day_launches_can_be_launched():
    """Every check, headline and choice of tuning, at its own sizes, through Triton's launcher."""
    found = elsewhere(
        "import json; from bench.day import carried;"
        "seen, failed = carried.rehearse('sm_90', 'bind', carried.STEPS, False);"
        "print(json.dumps([seen.launches, failed]))"
    )
    launches, failed = found
    assert failed == {}
    assert sum(launches.values()) > 500  # the binder sees the first of a kind
    assert {"forward", "backward_keys", "attend", "attend_packed", "product"} <= set(launches)


CARRIED = """
import json, os, sys
from pathlib import Path
from triton.runtime.jit import JITFunction
from bench.day import carried, ceilings
folder = Path(os.environ["FOLDER"])
def launched(cache):
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from effattn.kernels.bandwidth import triton_kernels
    for one in vars(triton_kernels).values():
        if isinstance(one, JITFunction):
            one.device_caches.clear()
    seen, failed = carried.rehearse("sm_90", "machine", ("ceilings",), False)
    assert not failed, failed
    return [dict(seen.found), dict(seen.compiled)]
first = launched(folder / "here")
count = carried.pack(folder / "here", folder / "cache.zip", "sm_90")
said = carried.unpack(folder / "cache.zip", folder / "there")
kept = sorted({one.suffix for one in (folder / "there").rglob("*.*")})
print(json.dumps([first, count, said, launched(folder / "there"), kept]))
"""


@pytest.mark.launch
def test_kernels_that_were_compiled_here_are_found_there(tmp_path):
    """A cache in another folder: the same launches compile nothing."""
    (first, count, said, there, kept) = elsewhere(CARRIED, FOLDER=str(tmp_path))
    assert first[0] == {}
    assert set(first[1]) == {"copy", "read", "write", "nothing"}
    assert count == 4
    assert said.endswith("4 kernels for sm_90, of these versions")
    assert there == [first[1], {}]
    assert kept == [".cubin", ".json"]


def test_a_cache_that_does_not_fit_says_so(tmp_path, monkeypatch):
    made = carried.versions()
    assert carried._fits({**made, "kernels": 3, "arch": "sm_90"}).startswith("3 kernels")
    other = {**made, "triton": "3.6.0", "kernels": 3, "arch": "sm_90"}
    assert f"triton 3.6.0, here {made['triton']}" in carried._fits(other)
    (tmp_path / "bad.zip").write_text("no zip")
    assert "it is not read" in carried.unpack(tmp_path / "bad.zip", tmp_path / "x")
    assert "it is not read" in carried.unpack(tmp_path / "none.zip", tmp_path / "x")


def script(*given: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "recipes/gpu_day.py", *given], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.launch
def test_the_script_runs_from_a_checkout(tmp_path):
    """End to end, of one step: what is there."""
    done = script("--device", "cpu", "--tiny", "--steps", "versions", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["jobs"]["versions"]["status"] == DONE
    assert found["jobs"]["versions"]["results"][0]["packages"]["torch"] == torch.__version__
    assert found["jobs"]["cache"]["results"][0]["right"]
    assert "versions  2 of 2" in done.stdout
    assert script("--steps", "verions").returncode == 2


@pytest.mark.slow
def test_a_whole_day_with_tiny_sizes(tmp_path):
    given = ("--device", "cpu", "--tiny", "--seconds", "3000", "--output", str(tmp_path))
    done = script(*given)
    assert done.returncode == 0, done.stderr
    for step in steps.STEPS:
        found = json.loads((tmp_path / f"{step.name}.json").read_text())
        assert {job["status"] for job in found["jobs"].values()} == {DONE}, step.name
