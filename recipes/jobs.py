"""What the jobs behind the commands share: silent progress, the device, one run at a time on an
output, and the folder that a killed run goes on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import wraps
from pathlib import Path

import torch

from effattn.errors import check_choice
from effattn.outputs import check_new_folder, claim
from effattn.reports.files import write_text_atomic

SETTINGS = "settings.json"  # in the folder of an unfinished run: what it was asked for


class Quiet:
    """Says and shows nothing: the base of the command line's progress display."""

    def stage(self, text: str):
        """Nothing is shown."""
        return nullcontext(lambda done, total: None)


def partial_folder(output: Path | str) -> Path:
    """Beside the folder that a job writes at its end: where what it resumes from lies until
    then.
    """
    target = Path(output).absolute()
    return target.parent / f".{target.name}.partial"


def main_process() -> bool:
    """Whether this process measures and writes: the only one, or rank 0 of several."""
    return int(os.environ.get("RANK", "0")) == 0


def device(name: str) -> torch.device:
    """ "auto" is this process's own GPU if there is one, else the CPU. Raises ValueError for other
    names and for "cuda" without one."""
    check_choice("device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: got 'cuda', torch sees no GPU here; valid are 'auto', 'cpu'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


# One run at a time
# -------------------------------------------------------------------------------------------------


def holds_output(report: type, default: str | None = None) -> Callable:
    """Decorates the `run` of a job that makes a new folder `job.output`: no other run works on it
    meanwhile, and what cannot be written is said before anything else. Without an output, `default`
    is what the run goes by.

    A run that was killed after its output was complete, and before it had removed what it went on
    from, is finished so: `report` is read from the output. Raises what `check_new_folder` and
    `claim` do."""

    def decorated(run: Callable) -> Callable:
        @wraps(run)
        def held(job, show=None):
            if not main_process() or (job.output is None and default is None):
                return run(job, show)
            if job.output is None:
                with claim("output", default):
                    return run(job, show)
            if not _complete(job):
                check_new_folder("output", job.output)
            with claim("output", job.output):
                if _finished(job):
                    return report.load(job.output)
                check_new_folder("output", job.output)
                return run(job, show)

        return held

    return decorated


def _complete(job) -> bool:
    return os.path.isfile(os.path.join(job.output, "report.json"))


def _finished(job) -> bool:
    """Whether the output is there, complete, from a run of these settings; what that run left
    beside it goes.
    """
    partial = getattr(job, "partial", None)
    if partial is None or not _complete(job):
        return False
    if partial.is_dir() and not any(partial.iterdir()):  # all but the last step of `discard`
        partial.rmdir()
    try:
        old = json.loads(
            (partial / SETTINGS if partial.is_dir() else partial).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return False
    if old.get("settings", old) != (job.settings if hasattr(job, "settings") else settings_of(job)):
        return False
    discard(partial)
    return True


def discard(partial: Path, last: str = SETTINGS) -> None:
    """Removes what a run went on from, its settings last: killed meanwhile, it is still known whose
    the rest is.
    """
    if partial.is_dir():
        for entry in partial.iterdir():
            if entry.name != last:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


# Going on
# -------------------------------------------------------------------------------------------------


def settings_of(job) -> dict:
    """What two runs must have in common for one to go on from the other, as JSON reads it back. A
    job's `APART` names what may differ beside the output, the device and the trainer's settings."""
    apart = {"output", "device", "overrides", *getattr(job, "APART", ())}
    settings = {key: value for key, value in asdict(job).items() if key not in apart}
    return json.loads(json.dumps(settings, default=str))


def check_partial(job, main: bool) -> None:
    """Writes the settings of this run, or compares them with those of the unfinished one.
    ValueError if they differ.
    """
    settings = settings_of(job)
    manifest = job.partial / SETTINGS
    if manifest.exists():
        try:
            old = dict(json.loads(manifest.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(
                f"{manifest} is damaged: delete {job.partial} to start again"
            ) from None
        if changed := sorted(key for key in settings if old.get(key) != settings[key]):
            raise ValueError(
                f"{job.partial} holds an unfinished run with other settings "
                f"({', '.join(changed)}): repeat them to go "
                "on, or delete that folder to start again"
            )
    elif main:
        job.partial.mkdir(parents=True, exist_ok=True)
        write_text_atomic(manifest, json.dumps(settings, indent=1) + "\n")
