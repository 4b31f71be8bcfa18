"""Processes that take turns on one machine: so many at a time, each within a limit of its own.

    jobs = [Job("flash", (sys.executable, "check.py", "flash"), seconds=60)]
    for outcome in run(jobs, workers=12, until=time.monotonic() + 90):
        outcome.status, outcome.results

A job reports what it found as soon as it knows it (`report`), so that what was found before it
failed, or its time was over, is there all the same."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPORT = "EFFATTN_DAY_REPORT"  # the file that a job's results go to, a line of JSON each
LOCK = "EFFATTN_DAY_LOCK"  # the file that a job holds while it has the device to itself
DONE, FAILED, LATE, WAITING = "done", "failed", "out of time", "not begun"
TAIL = 1500  # characters of what a job printed last that are kept
GRACE = 3.0  # seconds between a polite end and a forced one


@dataclass(frozen=True)
class Job:
    """A name, a command, and how many seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass
class Outcome:
    """How a job ended: its results so far, the exit code, and the end of what it printed if it did
    not end well."""

    name: str
    status: str
    seconds: float = 0.0
    code: int | None = None
    results: list[dict] = field(default_factory=list)
    tail: str = ""


def report(found: Mapping) -> None:
    """One more result of the job that this process is."""
    with open(os.environ[REPORT], "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


class _Running:
    """A job's process. Its output goes to files: a pipe that nobody reads would stop it."""

    def __init__(self, job: Job, folder: Path, env: Mapping[str, str], until: float):
        self.job, self.began = job, time.monotonic()
        self.until = min(until, self.began + job.seconds)
        stem = f"{len(list(folder.iterdir()))}"
        self.results, self.log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**env, REPORT: str(self.results), LOCK: str(folder / "lock")},
                start_new_session=True,  # its children end with it
            )

    def ended(self) -> Outcome | None:
        """What came of it; None as long as it may go on."""
        code, late = self.process.poll(), time.monotonic() >= self.until
        if code is None and not late:
            return None
        self._end()
        status = LATE if code is None else DONE if code == 0 else FAILED
        took = round(time.monotonic() - self.began, 2)
        tail = "" if status == DONE else self._tail()
        return Outcome(self.job.name, status, took, code, self._found(), tail)

    def _end(self) -> None:
        """Ends it, and what it started, even where it has ended by itself."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()

    def _found(self) -> list[dict]:
        if not self.results.exists():
            return []
        found = []
        for line in self.results.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # it was ended while it wrote this one
                continue
        return found

    def _tail(self) -> str:
        return self.log.read_bytes().decode("utf-8", "replace").strip()[-TAIL:]


def run(
    jobs: Sequence[Job],
    workers: int,
    until: float,
    env: Mapping[str, str] | None = None,
    interval: float = 0.05,
) -> Iterator[Outcome]:
    """The jobs' outcomes, each as soon as it is known; those whose turn did not come by `until`
    (`time.monotonic`) are `WAITING`. Every process has ended when this has, however that is."""
    waiting, running = list(jobs), []
    with tempfile.TemporaryDirectory(prefix="effattn-day-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers and time.monotonic() < until:
                    started = _Running(waiting.pop(0), Path(folder), env or os.environ, until)
                    running.append(started)
                for one in list(running):
                    if outcome := one.ended():
                        running.remove(one)
                        yield outcome
                if time.monotonic() >= until and not running:
                    yield from (Outcome(job.name, WAITING) for job in waiting)
                    return
                time.sleep(interval)
        finally:
            for one in running:
                one.until = 0.0
                one.ended()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside is one job of all at a time: what is timed has the device to itself, while others
    import and compile."""
    if not (path := os.environ.get(LOCK)):
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
