"""One step in a process of its own, so that its peak memory is its own: reads a job, writes what
was found.

    python -m bench.real.process JOB.json FOUND.json
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from bench.real.steps import Place, find
from effattn.reports.files import finite, write_text_atomic


def main(job: Path, found: Path) -> None:
    """The step of `job`; nothing is written where it fails."""
    from effattn.profiling.environment import environment

    asked = json.loads(job.read_text(encoding="utf-8"))
    step = find(asked["subject"], asked["step"])
    place = Place(
        asked["model"],
        [Path(one) for one in asked["text"]],
        Path(asked["held_out"]),
        Path(asked["output"]),
        Path(asked["measured"]),
    )
    numbers = step.run(place, **step.scaled(asked["small"]))
    said = {"found": plain(numbers), "environment": environment()}
    write_text_atomic(found, json.dumps(said, allow_nan=False))


def plain(thing):
    """As JSON has it: numbers that are none are null, paths and tuples texts and lists."""
    if isinstance(thing, Mapping):
        return {str(key): plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(value) for value in thing]
    return str(thing) if isinstance(thing, Path) else finite(thing)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
