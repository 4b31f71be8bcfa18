"""All of it: which rows there are, the plan, and the loop that keeps what was measured."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch

from bench import rows
from bench.case import Case, Target
from bench.day import jobs
from bench.growth import fits
from bench.measure import estimate, measure
from bench.peers import roster
from effattn.errors import check_choice
from effattn.profiling.device import Peaks
from effattn.profiling.environment import environment

PART = 540.0  # seconds that one part of a run may take
TESTED = 240.0  # and the kernels' tests before it


def parts_of_rows() -> list[ModuleType]:
    """The modules in `rows/`, by name."""
    return [
        importlib.import_module(f"{rows.__name__}.{found.name}")
        for found in pkgutil.iter_modules(rows.__path__)
    ]


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """The cases of all rows for `device` ("cpu" or "cuda"); quick: short lengths, to see that
    everything runs.
    """
    found = list(chain.from_iterable(module.cases(device, quick) for module in parts_of_rows()))
    if device == "cuda":  # growth is worth the least of a machine that is lent for minutes
        found.sort(key=lambda case: case.declared is not None)
    names = [case.name for case in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"rows: two cases have the same name: {', '.join(twice)}")
    return found


def all_targets(device: str) -> list[Target]:
    """Of all files in `rows`."""
    return list(chain.from_iterable(module.targets(device) for module in parts_of_rows()))


def choose(
    cases: list[Case], only: str | None = None, part: tuple[int, int] = (1, 1)
) -> list[Case]:
    """The cases whose name contains `only`, and of those every n-th from the i-th. ValueError if
    none is left.
    """
    if only:
        chosen = [case for case in cases if only in case.name]
        if not chosen:
            check_choice(
                "only: part of a name",
                only,
                sorted({x for case in cases for x in (case.what, case.title) if x}),
            )
        cases = chosen
    return cases[part[0] - 1 :: part[1]]


def parse_part(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"part: got {text!r}, valid is like 1/3, 2/3, 3/3")
    return int(index), int(count)


def plan(
    cases: Iterable[Case], results: dict, peaks: Peaks | None, seconds: float
) -> dict[str, float]:
    """Name -> expected seconds, of the cases that `results` lacks."""
    return {
        case.name: estimate(case, peaks, seconds)
        for case in cases
        if case.name not in results["cases"]
    }


def say(planned: dict[str, float], kept: int) -> str:
    """The plan in one line."""
    total = sum(planned.values())
    parts = -(-total // PART)
    split = (
        f"; {parts:.0f} parts of under {PART / 60:.0f} minutes (--part i/{parts:.0f})"
        if parts > 1
        else ""
    )
    before = f", {kept} are measured already" if kept else ""
    return f"{len(planned)} cases{before}: about {total / 60:.0f} min {total % 60:.0f} s{split}"


def run_tests(files: list[Path], seconds: float = TESTED) -> None:
    """The kernels' tests on this device, a file a process, all to their end. RuntimeError if one
    fails, with all that do."""
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise RuntimeError(f"tests: {', '.join(missing) or 'none'} not found; run from a checkout")
    command = (sys.executable, "-m", "pytest", "-q", "--tb=line")
    tests = [jobs.Job(file.stem, (*command, str(file)), seconds) for file in files]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    workers, until = min(len(files), os.cpu_count() or 1), time.monotonic() + seconds
    bad = [one for one in jobs.run(tests, workers, until, env) if one.status != jobs.DONE]
    if bad:
        said = "; ".join(f"{x.name} {x.status} {' '.join(x.tail.split())[-150:]}" for x in bad)
        raise RuntimeError(f"tests: they fail here, nothing is timed: {said}")


def run(
    cases: list[Case],
    device: torch.device,
    results: dict,
    seconds: float,
    peaks: Peaks | None = None,
    done: Callable[[str, dict], None] = lambda name, results: None,
) -> dict:
    """Measures the cases that `results` lacks, about `seconds` each, and returns `results`. `done`
    is called after each case, with its name and the results so far: to save and to show them."""
    results["peaks"] = peaks.to_dict() if peaks else None
    raced = {
        kind: [one.name for case in all_cases(kind) for one in case.contenders]
        for kind in ("cpu", "cuda")
    }
    results["peers"] = {
        who: peer
        | {
            "rows": {
                kind: sum(name.startswith(f"{who} ") for name in names)
                for kind, names in raced.items()
            }
        }
        for who, peer in roster().items()
    }
    for case in cases:
        if case.name not in results["cases"]:
            results["cases"][case.name] = measure(case, device, seconds, peaks)
            results["environment"] = environment()
            done(case.name, results)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def judge(results: dict) -> dict:
    """`results` with "growth" (exponents) and "checks" (targets) filled in."""
    results["growth"] = fits(results)
    results["checks"] = [
        target.judge(results) for target in all_targets(results["settings"]["device"])
    ]
    return results


def faults(results: dict) -> list[str]:
    """Why the benchmark's own check fails: wrong answers of ours, and growth beyond what is
    declared.
    """
    mine = [
        f"{case}: {who}: {row['wrong']}"
        for case, measured in results["cases"].items()
        for who, row in measured["contenders"].items()
        if row["ours"] and "wrong" in row
    ]
    grown = [row for row in results["growth"] if row["passes"] is False]
    return mine + [
        f"{row['case']}: {row['of']} grows with exponent {row['measured']:.2f}, declared "
        f"{row['declared']:g}"
        for row in grown
    ]
