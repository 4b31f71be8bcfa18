"""The names under which jobs that are no recipes yet take what `recipes/flow.py` has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import wraps

from effattn.recipes.flow import device, output_of
from effattn.resuming import SETTINGS, as_json, check_settings, discard, partial_folder
from effattn.stages import Quiet, main_process

__all__ = [
    "SETTINGS",
    "Quiet",
    "check_partial",
    "device",
    "discard",
    "holds_output",
    "main_process",
    "partial_folder",
    "settings_of",
]


def holds_output(report: type, default: str | None = None) -> Callable:
    """Decorates the `run` of a job with `output_of`."""

    def decorated(run: Callable) -> Callable:
        @wraps(run)
        def held(job, show=None):
            with output_of(_AsSettings(job), default) as finished:
                return report.load(job.output) if finished else run(job, show)

        return held

    return decorated


class _AsSettings:
    """A job, asked as settings are."""

    def __init__(self, job):
        self.output, self.partial = job.output, getattr(job, "partial", None)
        self.kept = lambda: job.settings if hasattr(job, "settings") else settings_of(job)


def settings_of(job) -> dict:
    """What two runs must have in common for one to go on from the other, as JSON reads it back. A
    job's `APART` names what may differ beside the output, the device and the trainer's settings."""
    apart = {"output", "device", "overrides", *getattr(job, "APART", ())}
    return as_json({key: value for key, value in asdict(job).items() if key not in apart})


def check_partial(job, main: bool) -> None:
    """Writes the settings of this run, or compares them with those of the unfinished one.
    ValueError if they differ.
    """
    check_settings(job.partial, settings_of(job), main)
