"""What the jobs behind the commands share: silent progress, the device, and the folder a killed run goes on from."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from effattn.errors import check_choice
from effattn.reports.files import write_text_atomic


class Quiet:
    """Says and shows nothing: the base of the command line's progress display."""

    def stage(self, text: str):
        return nullcontext(lambda done, total: None)


def partial_folder(output: Path | str) -> Path:
    """Beside the folder that a job writes at its end: where what it resumes from lies until then."""
    target = Path(output).absolute()
    return target.parent / f".{target.name}.partial"


def device(name: str) -> torch.device:
    """ "auto" is this process's own GPU if there is one, else the CPU. Raises ValueError for other names and for
    "cuda" without one."""
    check_choice("device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: got 'cuda', torch sees no GPU here; valid are 'auto', 'cpu'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check_partial(job, main: bool) -> None:
    """Writes the settings of this run, or compares them with those of the unfinished one. ValueError if they differ."""
    settings = {key: value for key, value in asdict(job).items() if key not in ("output", "device", "overrides")}
    settings = json.loads(json.dumps(settings, default=str))
    manifest = job.partial / "settings.json"
    if manifest.exists():
        old = json.loads(manifest.read_text())
        if changed := sorted(key for key in settings if old.get(key) != settings[key]):
            raise ValueError(
                f"{job.partial} holds an unfinished run with other settings ({', '.join(changed)}): repeat them to go "
                "on, or delete that folder to start again"
            )
    elif main:
        job.partial.mkdir(parents=True, exist_ok=True)
        write_text_atomic(manifest, json.dumps(settings, indent=1) + "\n")
