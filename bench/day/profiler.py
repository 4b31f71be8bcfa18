"""What the hardware's counters say of the headline that is furthest from its target, by Nsight
Compute. The clocks stay as they are: others share the machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from bench.day import ratios
from bench.day.settings import ROOT, Day

SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "SchedulerStats",
)
KEPT = 9000  # characters of its report
SKIPPED, COUNTED = 2, 4  # launches


def names(day: Day) -> list[str]:
    """The worst headline, if there is a profiler."""
    return ["worst"]


def worst(day: Day) -> tuple[str, str, list[str]] | None:
    """(case, contender, kernels) of the headline with the least of its target; None where none was
    measured."""
    file = day.output / "headlines.json"
    if not file.exists():
        return None
    jobs = json.loads(file.read_text(encoding="utf-8"))["jobs"]
    found = {name: row for name, job in jobs.items() for row in job["results"]}
    reached = [
        (value / one.target, one)
        for one in ratios.HEADLINES
        if (value := one.value({"cases": found})) is not None
    ]
    if not reached:
        return None
    _, least = min(reached, key=lambda pair: pair[0])
    return least.case, least.of, sorted(found[least.case]["kernels"])


def run(name: str, day: Day) -> Iterator[dict]:
    """{"case", "contender", "report"}, or {"absent": why not}."""
    tool, chosen = shutil.which("ncu"), worst(day)
    if tool is None or chosen is None:
        yield {"absent": "there is no ncu" if tool is None else "no headline was measured"}
        return
    case, contender, kernels = chosen
    command = [tool, "--clock-control", "none", "--target-processes", "all"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += ["--kernel-name", f"regex:^({'|'.join(map(re.escape, kernels))})$"]
    command += ["--launch-skip", str(SKIPPED), "--launch-count", str(COUNTED)]
    command += [sys.executable, "-m", "bench.day.profiler", case, contender]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield {
        "case": case,
        "contender": contender,
        "code": done.returncode,
        "report": (done.stdout + done.stderr)[-KEPT:],
    }


def launch(name: str, day: Day) -> None:
    """Nothing that `headlines` does not."""


def main(case_name: str, contender: str) -> None:
    """A few calls of one contender: what is profiled."""
    import torch

    from bench.day import headlines

    case, device = headlines.chosen(case_name, Day()), torch.device("cuda")
    one = next(one for one in case.contenders if one.name == contender)
    inputs = case.inputs(case.length(one), device)
    call = one.build(case, inputs)
    for _ in range(SKIPPED + COUNTED):
        case.once(call, inputs)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
