"""The loop: every step in a process of its own, its result kept at once, none done twice.

What a step found lies in WORK/done; with the code, model, text and settings that it was found with,
whose digest decides whether it is done. The files of results are made of these, and keep what they
have of steps that were not asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import effattn
import effattn.kernels
import effattn.prune
import effattn.quant
import effattn.recipes
from bench.real.process import plain
from bench.real.steps import Step
from bench.results import digest_of
from effattn.reports.files import write_text_atomic

KIND, VERSION = "real", 1
PACKAGES = (effattn, effattn.kernels, effattn.prune, effattn.quant, effattn.recipes)


@dataclass(frozen=True)
class Job:
    """What all steps have in common. work: a folder that git ignores; small: fewer tokens, to see
    that all runs."""

    model: str
    text: Sequence[Path]
    held_out: Path
    work: Path
    small: bool = False

    def read(self) -> dict:
        """What was read, as results tell it: no path of this machine."""
        body = hashlib.sha256(b"".join(one.read_bytes() for one in [*self.text, self.held_out]))
        name = Path(self.model).name
        return {"model": name, "model_digest": weights_digest(self.model), "text": body.hexdigest()}


def weights_digest(model: str) -> str:
    """Of the weights' files: another model is another result."""
    from effattn.hf.source import folder_of

    digest = hashlib.sha256()
    for file in sorted(folder_of(model).glob("*.safetensors")):
        with file.open("rb") as body:
            digest.update(hashlib.file_digest(body, "sha256").digest())
    return digest.hexdigest()


def digest(job: Job, read: Mapping, settings: Mapping) -> str:
    """Of everything that decides a step's result."""
    code = digest_of(PACKAGES)
    said = json.dumps([code, read, plain(settings), job.small], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def measured(job: Job, subject: str) -> Path:
    """The file in which a subject's steps share what they measure (`Place`), of this code alone."""
    size = "small" if job.small else "full"
    return job.work / "measured" / f"{subject}-{size}-{digest_of(PACKAGES)[:16]}.json"


def run(
    job: Job,
    steps: Sequence[tuple[str, Step]],
    kept: Callable[[str, str, dict], None],
    say: Callable[[str], None] = partial(print, flush=True),
) -> list[str]:
    """Runs (subject, step) after (subject, step) where it is not done; kept(subject, step's name,
    row) is called for each that is. Returns the names of those that failed: the others run on."""
    read, failed = job.read(), []
    for number, (subject, step) in enumerate(steps, 1):
        settings = step.scaled(job.small)
        wanted, name = digest(job, read, settings), f"{subject}/{step.name}"
        file = job.work / "done" / subject / f"{_slug(step.name)}.json"
        row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        said = f"{number}/{len(steps)}  {name}"
        if row.get("digest") != wanted:
            say(f"{said} ...")
            row = once(job, subject, step, wanted)
            if "error" in row:
                failed.append(name)
                say(f"{said}  FAILED: {row['error']}")
                continue
            row = {"digest": wanted, "settings": plain(settings), "read": read} | row
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(file, json.dumps(row, indent=1, allow_nan=False) + "\n")
        say(f"{said}  {row['cpu_seconds']:.0f} s of CPU, {row['peak_bytes'] / 2**20:,.0f} MiB")
        kept(subject, step.name, row)
    return failed


def once(job: Job, subject: str, step: Step, wanted: str) -> dict:
    """One step in a new process: what it found, CPU seconds (its children's among them), wall
    seconds, and the most memory that one of these processes held; or {"error"}. wanted: its digest;
    what an unfinished run of the same left is gone on from, as far as its recipe can."""
    folder = job.work / "running" / subject / _slug(step.name)
    asked, found, log = folder / "job.json", folder / "found.json", folder / "log.txt"
    given = {
        "digest": wanted,
        "subject": subject,
        "step": step.name,
        "model": job.model,
        "text": job.text,
        "held_out": job.held_out,
        "output": folder / "output",
        "measured": measured(job, subject),
        "small": job.small,
    }
    said = json.dumps(plain(given))
    if folder.exists() and not (asked.is_file() and asked.read_text(encoding="utf-8") == said):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    given["measured"].parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(asked, said)
    start = time.perf_counter()
    with log.open("wb") as lines:
        command = [sys.executable, "-m", "bench.real.process", str(asked), str(found)]
        child = subprocess.Popen(command, stdout=lines, stderr=lines)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"error": (lines or [f"exit code {child.returncode}"])[-1][-300:]}
    row = json.loads(found.read_text(encoding="utf-8"))
    shutil.rmtree(folder)  # a checkpoint that nobody needs any more
    return row | {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def keep(file: Path, subject: str, step: str, row: Mapping) -> None:
    """Puts a step's row into the file of its subject."""
    data = {"kind": KIND, "version": VERSION, "subject": subject, "steps": {}}
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
    data["environment"] = row["environment"]
    data["steps"][step] = dict(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _slug(name: str) -> str:
    """A name of a step as one of a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
