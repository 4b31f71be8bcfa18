"""The steps of a day, and the loop that runs them and keeps what they find.

Each step's results are a JSON file of its own, written anew after each of its jobs. A job that is
in there as done is not done again, as long as the sources and the machine are the same."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from bench.day.jobs import DONE, Job, report
from bench.day.jobs import run as run_jobs
from bench.day.settings import ROOT, Day

KIND, VERSION = "gpu day", 1
SCRIPT = ROOT / "recipes" / "gpu_day.py"
SITE = Path(__file__).parent / "site"
SOURCES = ("effattn", "kernels", "prune", "quant", "bench")
TOTAL = 540.0  # seconds of a day
PATIENCE = 8  # times as long as on a GPU, where there is none: then it is about running at all


@dataclass(frozen=True)
class Step:
    """module: in this folder, with `names(day)`, its jobs, `run(name, day)`, which yields a job's
    results, and `launch(name, day)`, which launches what that would. seconds: of the step;
    `longest`: of a job. workers: jobs at a time."""

    name: str
    module: str
    seconds: float
    workers: int
    longest: float

    def load(self) -> ModuleType:
        """The module; what it imports is imported only now."""
        return importlib.import_module(f"bench.day.{self.module}")


STEPS = (
    Step("versions", "versions", 25, 2, 25),
    Step("ceilings", "ceilings", 25, 1, 25),
    Step("correctness", "correctness", 90, 12, 85),
    Step("headlines", "headlines", 120, 4, 60),
    Step("tuning", "tuning", 120, 4, 60),
    Step("profiler", "profiler", 60, 1, 58),
    Step("tests", "kernel_tests", 60, 12, 58),
)


def do(step: str, name: str, day: Day) -> None:
    """One job, in this process: each result is reported as soon as there is one."""
    found = next(one for one in STEPS if one.name == step)
    for result in found.load().run(name, day):
        report(result)


def key(day: Day) -> dict:
    """What has to be the same for a result to stand."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return {"sources": digest.hexdigest()[:16], "device": day.device, "tiny": day.tiny}


def read(file: Path, wanted: Mapping) -> dict:
    """The jobs of a step's file that are done; none of a file of other sources, or none of ours."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        same = (found["kind"], found["version"], found["key"]) == (KIND, VERSION, dict(wanted))
        return {x: job for x, job in found["jobs"].items() if job["status"] == DONE} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(file: Path, found: Mapping) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(new, file)


def environment(cache: Path) -> dict[str, str]:
    """Of the jobs: the checkout is importable, what is compiled is kept in `cache`."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(SITE), str(ROOT), env.get("PYTHONPATH"))))
    env.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    env["HF_HUB_OFFLINE"] = "1"
    return env


def go(
    day: Day,
    seconds: float,
    cache: Path,
    only: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """{step: what its file holds}. `only`: steps; all otherwise. Whatever fails is in the results;
    this does not."""
    until, wanted, env = time.monotonic() + seconds, key(day), environment(cache)
    results, slower = {}, 1 if day.device == "cuda" else PATIENCE
    for step in STEPS:
        if only and step.name not in only:
            continue
        file = day.output / f"{step.name}.json"
        found = {"kind": KIND, "version": VERSION, "step": step.name, "key": wanted}
        found["jobs"] = read(file, wanted)
        results[step.name] = found
        left = min(slower * step.seconds, until - time.monotonic())
        tell(f"{step.name}: {len(found['jobs'])} jobs are done, {max(0.0, left):.0f} s")
        try:
            names = step.load().names(day)
        except Exception as error:  # of any kind: the other steps go on
            found["failed"] = f"{type(error).__name__}: {error}"
            write(file, found)
            continue
        jobs = [_job(step, name, day) for name in names if name not in found["jobs"]]
        for outcome in run_jobs(jobs, step.workers, time.monotonic() + max(0.0, left), env):
            found["jobs"][outcome.name] = asdict(outcome)
            write(file, found)
            tell(f"  {outcome.status}, {outcome.seconds:.1f} s: {outcome.name}")
    return results


def _job(step: Step, name: str, day: Day) -> Job:
    command = [sys.executable, str(SCRIPT), "--job", step.name, name]
    command += ["--device", day.device, "--output", str(day.output), *["--tiny"] * day.tiny]
    return Job(name, tuple(command), step.longest * (1 if day.device == "cuda" else PATIENCE))
