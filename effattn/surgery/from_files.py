"""Conversions from checkpoint to checkpoint, for models that do not fit into memory.

    effattn.convert_files("llama", "llama-gqa", tokens, heads="gqa(kv_heads=8)")

What happens to a layer is what happens to it in memory, and so is the result; how the layers come
and go is `effattn.calibration.from_files`' business."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effattn.calibration.from_files import MANIFEST, FileWalk, resume
from effattn.errors import Unsupported
from effattn.heads.kinds.base import KINDS, Job
from effattn.hf import shards
from effattn.hf.anatomy import Anatomy
from effattn.hf.beginning import bos_of, settle, tokenizer_in
from effattn.hf.streamed import Checkpoint, StreamedModel
from effattn.hf.trusted import KEY
from effattn.outputs import check_new_folder, claim
from effattn.resuming import discard
from effattn.specs import parse_spec
from effattn.surgery import projecting, replace, restoring

FACTS = "conversion.json"  # in the output: what was done


def convert_files(
    source: str | Path,
    output: str | Path,
    calibration: Tensor,
    *,
    heads: str | None = None,
    projections: str | dict[str | int, str] | None = None,
    bos: bool | None = None,
    device: torch.device | str = "cpu",
    work: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Converts the safetensors checkpoint in the folder `source` into the new folder `output`, one
    decoder layer in memory at a time, with the result that the same has in memory.

    heads: "gqa(kv_heads=...)", "mqa" or "latent(ratio=0.5)", or projections: "lowrank(ratio=0.75)"
    and what else `effattn.swap` takes, one of both; their options are those of `convert_gqa`,
    `convert_latent` and `swap`. calibration: int64 (N,), at least ten tokens per hidden dimension;
    what was written is checked on its first windows. bos: whether BOS takes the place of each
    window's first token (None: as the checkpoint's tokenizer does it). device: where a layer is
    converted. work: where an unfinished run is kept, from which the same call goes on (default
    `.<output>.converting` beside `output`; on the same file system). progress: called with (steps
    done, steps).

    Returns what `convert_gqa` and `convert_latent` do, with its `verification`; for projections
    their errors, as `effattn.surgery.replace.errors`. Raises as they do, ValueError for an output
    that is not empty and for an unfinished run with other settings or another source, and
    RuntimeError when the new files do not give what was computed."""
    source, output = Path(source), Path(output).absolute()
    work = Path(work) if work is not None else output.parent / f".{output.name}.converting"
    # The output has its name, and the run was killed before it had removed its own folder.
    finished = (work / MANIFEST).is_file() and (output / FACTS).is_file()
    if not finished:
        check_new_folder("output", output)
    model, job = _opened(source, calibration, heads, projections, bos, device)
    asked = {"heads": heads, "projections": projections, **job.settings}
    wanted = asked | shards.fingerprint(model.checkpoint, calibration)
    before = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # the output is ours until we are done: a second process with the same output is refused
    with claim("output", output):
        if finished:
            resume(work / MANIFEST, wanted)
        else:
            batches = job.batches or replace.windows_of(calibration, model.parts)
            walk = FileWalk(model, work, batches, wanted)
            rows = job.carry_out(walk, progress)

            def facts(verification: dict) -> tuple[str, dict]:
                return FACTS, {"settings": asked, "layers": rows, "verification": verification}

            config = job.config(before, rows)
            shape = partial(restoring.shape, config[KEY]) if KEY in config else None
            walk.finish(output, facts, config=config, shape=shape)
        discard(work, MANIFEST)
    return report_of(output, model.parts, job)


def report_of_files(
    source: str | Path,
    output: str | Path,
    calibration: Tensor,
    *,
    heads: str | None = None,
    projections: str | dict[str | int, str] | None = None,
    bos: bool | None = None,
) -> Any:
    """What `convert_files` has returned for an output that is complete."""
    model, job = _opened(Path(source), calibration, heads, projections, bos, "cpu")
    return report_of(Path(output), model.parts, job)


def _opened(
    source: Path,
    calibration: Tensor,
    heads: str | None,
    projections: str | dict[str | int, str] | None,
    bos: bool | None,
    device: torch.device | str,
) -> tuple[StreamedModel, Job]:
    """The source, no layer of it in memory, and what is to be done to it, checked."""
    model = StreamedModel(Checkpoint(source), torch.device(device))
    # the shell of a model knows no place that it comes from
    settle(model.parts.model, bos, tokenizer_in(source))
    return model, job_of(model.parts, calibration, heads, projections)


def job_of(
    parts: Anatomy,
    calibration: Tensor,
    heads: str | None,
    projections: str | dict[str | int, str] | None,
) -> Job:
    """What is asked for, checked. ValueError and Unsupported as for `effattn.swap`."""
    if (heads is None) == (projections is None):
        raise ValueError(
            f"convert_files: got heads={heads!r} and projections={projections!r}, valid is one of "
            "them; the output of one call may be the source of the next"
        )
    if calibration is None:
        raise ValueError("calibration: got None, valid is an int64 tensor (N,) of token ids")
    if projections is not None:
        return projecting.ProjectingJob(replace.make(parts, projections, calibration), projections)
    name, options = parse_spec(str(heads))
    change = KINDS.find(name).change(parts, str(heads), options)
    if change is None or change.kv_heads == parts.kv_heads:
        raise Unsupported(f"heads: got {heads!r}, which the checkpoint has; there is nothing to do")
    return change.job(parts, calibration, bos_of(parts.model))


def report_of(output: Path, old: Anatomy, job: Job) -> Any:
    """What is known of a conversion that is complete."""
    told = json.loads((output / FACTS).read_text(encoding="utf-8"))
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    shape = partial(restoring.shape, config[KEY]) if KEY in config else None
    new = StreamedModel(Checkpoint(output), shape=shape).parts
    report = job.report(old, new, told["layers"])
    if hasattr(report, "data"):
        report.data["verification"] = told["verification"]
    return report
