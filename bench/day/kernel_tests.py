"""The kernels' tests on this device, a file a process; none stops at what fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from bench.day.settings import ROOT, Day

TESTS = ROOT / "tests" / "kernels"
ELSEWHERE = ("test_launch", "test_aot")  # what they find needs no GPU
LINE = re.compile(r"(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)")
EVERY = 20  # tests that pass, after which that is told


def names(day: Day) -> list[str]:
    """Files, the largest first."""
    files = [file for file in TESTS.glob("test_*.py") if file.stem not in ELSEWHERE]
    files.sort(key=lambda file: -file.stat().st_size)
    return ["test_range"] if day.tiny else [file.stem for file in files]


def run(name: str, day: Day) -> Iterator[dict]:
    """{"passed": how many so far} now and then and at the end, {"failed": a test's name}."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if day.device == "cpu":
        env["TRITON_INTERPRET"] = "1"
    with subprocess.Popen(
        [*command, f"tests/kernels/{name}.py"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        passed = 0
        for line in process.stdout or ():
            print(line, end="")
            if not (found := LINE.search(line)):
                continue
            if found[2] in ("FAILED", "ERROR"):
                yield {"failed": found[1]}
            passed += found[2] == "PASSED"
            if found[2] == "PASSED" and passed % EVERY == 0:
                yield {"passed": passed}
    yield {"passed": passed, "code": process.returncode}


def launch(name: str, day: Day) -> None:
    """Nothing ahead of time: tests have sizes of their own."""
