"""The whole conversion job behind `recipes/convert_gqa.py` and `effattn convert-gqa`.

Load, measure the parent, convert, measure, uptrain, measure, time decoding, save, prove in a fresh
process that plain transformers loads the result, and only then give it its name.
`.<output>.partial` beside the target holds the checkpoints of an unfinished uptraining; the same
command goes on from there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import check_choice
from effattn.evaluate.loss import compare, perplexity_of, token_losses
from effattn.heads import gqa
from effattn.heads.grouping import GROUPINGS
from effattn.heads.report import ConversionReport
from effattn.hf import anatomy as hf
from effattn.hf.verify import verify_plain
from effattn.hf.weights import weight_bytes
from effattn.outputs import atomic_folder, check_new_folder, check_room
from effattn.profiling.decode import decode_speed
from effattn.recipes.jobs import (
    Quiet,
    check_partial,
    device,
    discard,
    holds_output,
    main_process,
    partial_folder,
)
from effattn.surgery.checkpoint import load_model
from effattn.textdata import Streams, streams
from effattn.training.uptrain import CE_WEIGHT, LAYER_WEIGHT, TRAINABLE, uptrain


@dataclass
class Job(Checked):
    """The settings of one conversion. A run is resumed only with the same ones."""

    model: str
    kv_heads: int = whole(least=1)
    output: Path
    method: str = "optimal"
    refit: bool = True
    grouping: str = "contiguous"
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    calibration_tokens: int = whole(50_000, least=1)
    evaluation_tokens: int = whole(32_768, least=2)
    uptrain_tokens: int = whole(0, least=0)
    length: int = whole(512, least=8, unit="tokens")
    batch: int = whole(2, least=1)
    lr: float | None = real(None, above=0)
    ce_weight: float = real(CE_WEIGHT, least=0)
    layer_weight: float = real(LAYER_WEIGHT, least=0)
    trainable: str = "attention"
    seed: int = random_seed()
    decode_contexts: Sequence[int] = whole((512, 4096, 16384), least=1)
    device: str = "auto"
    overrides: dict = field(default_factory=dict)

    APART: ClassVar = ("decode_contexts",)  # a run goes on with others

    @property
    def partial(self) -> Path:
        return partial_folder(self.output)


@holds_output(ConversionReport)
def run(job: Job, show: Quiet | None = None) -> ConversionReport:
    """Runs `job`; returns the report, which also lies in the output folder as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, OSError (disk), each before
    anything appears under the output's name. Under torchrun or `accelerate launch` every process
    calls it; rank 0 writes."""
    show = show or Quiet()
    main = main_process()
    check_job(job)
    with show.stage("loading the model"):
        parent, tokenizer = load_model(job.model)
        parent.to(device(job.device))
        parts = hf.of(parent)
        parts.require_gqa()
        gqa.check_kv_heads(job.kv_heads, parts.kv_heads)
        # no more than half of them is keys and values
        check_room("output", job.output, weight_bytes(parent) // 2)
    with show.stage("reading text"):
        data = streams(
            tokenizer,
            train=max(job.calibration_tokens, job.uptrain_tokens),
            evaluation=job.evaluation_tokens,
            text=job.text,
            dataset=job.dataset,
            column=job.column,
        )
        calibration = data.train[: job.calibration_tokens]
        length = gqa.check_calibration(calibration, parts, job.length)
        if job.uptrain_tokens and job.uptrain_tokens > 20 * len(data.train):
            raise ValueError(
                f"uptrain_tokens: got {job.uptrain_tokens:,}, the text has {len(data.train):,} "
                "tokens: more than "
                f"20 passes over it; give more text or at most {20 * len(data.train):,}"
            )
    quality = None
    if main:
        with show.stage("measuring the parent") as progress:
            quality = measure_parent(parent, data, length, progress)
    student = copy.deepcopy(parent)
    with show.stage(f"converting {parts.kv_heads} -> {job.kv_heads} KV heads") as progress:
        report = gqa.convert_gqa(
            student,
            job.kv_heads,
            calibration,
            method=job.method,
            refit=job.refit,
            grouping=job.grouping,
            length=length,
            seed=job.seed,
            progress=progress,
        )
    if main:
        with show.stage("measuring the conversion") as progress:
            quality["converted"] = compare(
                parent, student, data.evaluation, length, progress=progress
            )
    report.data["quality"] = quality
    report.data["settings"] |= {
        "model": job.model,
        "calibration_source": data.source,
        "uptrain_tokens": job.uptrain_tokens,
        "uptrain_batch": job.batch,
        "ce_weight": job.ce_weight,
        "layer_weight": job.layer_weight,
        "trainable": job.trainable,
    }
    if job.uptrain_tokens:
        report.data["uptraining"] = _uptrain(job, student, parent, data, length, show)
        if main:
            with show.stage("measuring the uptrained model") as progress:
                quality["uptrained"] = compare(
                    parent, student, data.evaluation, length, progress=progress
                )
    if main:
        if job.decode_contexts:
            with show.stage("timing decode steps") as progress:
                report.data["decode"] = _decode(parent, student, job.decode_contexts, progress)
        with (
            show.stage("saving, and loading again without effattn"),
            atomic_folder(job.output) as folder,
        ):
            student.config.use_cache = True
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            report.data["verification"] = verify_plain(
                folder, student, data.evaluation[: min(64, length)]
            )
            report.save(folder)
        discard(job.partial)
    return report


def measure_parent(parent, data: Streams, length: int, progress=None) -> dict:
    """The start of a report's "quality": what was measured on, and the parent there."""
    loss = float(token_losses(parent, data.evaluation, length, progress=progress).double().mean())
    return {
        "tokens": len(data.evaluation),
        "context": length,
        "source": data.source,
        "before": {"perplexity": perplexity_of(loss), "cross_entropy": loss},
        "uptrained": None,
    }


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    check_choice("method", job.method, gqa.METHODS)
    check_choice("grouping", job.grouping, GROUPINGS)
    check_choice("trainable", job.trainable, TRAINABLE)
    device(job.device)
    check_new_folder("output", job.output)
    # an unfinished run with other settings, while nothing has been done yet
    check_partial(job, main=False)


def _uptrain(job: Job, student, parent, data: Streams, length: int, show: Quiet) -> dict:
    check_partial(job, main_process())
    with show.stage(f"uptraining on {job.uptrain_tokens:,} tokens") as progress:
        result = uptrain(
            student,
            parent,
            data.train,
            train_tokens=job.uptrain_tokens,
            folder=job.partial / "uptrain",
            evaluation=data.evaluation[:8_192],
            length=length,
            batch=job.batch,
            lr=job.lr,
            ce_weight=job.ce_weight,
            layer_weight=job.layer_weight,
            trainable=job.trainable,
            seed=job.seed,
            progress=progress,
            overrides={"use_cpu": student.device.type == "cpu"} | job.overrides,
        )
    pretraining = embedded.card()["train_tokens"] if job.model == embedded.NAME else None
    result["share_of_pretraining"] = result["tokens"] / pretraining if pretraining else None
    return result


def _decode(parent, student, contexts: Sequence[int], progress) -> list[dict]:
    timed = decode_speed({"before": parent, "after": student}, list(contexts), progress=progress)
    rows: dict[int, dict] = {}
    for row in timed:
        entry = rows.setdefault(row["context"], {"context": row["context"], "batch": row["batch"]})
        entry[row["model"]] = {
            key: value for key, value in row.items() if key not in ("context", "batch", "model")
        }
    return list(rows.values())
