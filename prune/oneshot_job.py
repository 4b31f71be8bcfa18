"""The whole job behind `recipes/prune_oneshot.py` and `effattn prune oneshot`.

Prune from file to file (`effattn.prune.unstructured.from_files`), and, where the model fits into
memory three times: measure before and after, compare methods, distil with the zeros kept, time
decoding, and prove that plain transformers loads the result. `.<output>.partial` beside the output
keeps an unfinished run; the same command goes on from there."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.calibration.hessian import DAMPING
from effattn.errors import check_choice
from effattn.evaluate.loss import compare
from effattn.hf.verify import verify_plain
from effattn.outputs import atomic_folder, check_new_folder, check_room
from effattn.profiling.decode import decode_speed
from effattn.profiling.environment import environment
from effattn.profiling.memory import available_bytes
from effattn.prune.unstructured import layers
from effattn.prune.unstructured.from_files import FACTS, prune_files, resume
from effattn.prune.unstructured.nm import Sparsity
from effattn.prune.unstructured.one_shot import oneshot
from effattn.prune.unstructured.plan import ALLOCATIONS, METHODS, said
from effattn.prune.unstructured.report import KIND, OneShotReport, counts
from effattn.prune.unstructured.streamed import Checkpoint, StreamedModel
from effattn.prune.unstructured.zeros import keep_zeros
from effattn.recipes.jobs import (
    SETTINGS,
    Quiet,
    device,
    discard,
    holds_output,
    main_process,
    partial_folder,
    settings_of,
)
from effattn.surgery.checkpoint import load_model, load_tokenizer, resolve
from effattn.textdata import Streams, streams

MEASURE = ("auto", "yes", "no")
LR = 1 / 3  # of what suits uptraining after a head conversion, which breaks more
# of the weights, that measuring needs room for: the dense model, the pruned one, and one to compare
# with
COPIES = 3


@dataclass
class Job(Checked):
    """The settings of one run. The first method and sparsity are what is saved, the others are
    compared with it.
    """

    output: Path
    model: str = embedded.NAME
    methods: Sequence[str] = METHODS
    sparsities: Sequence[str | Sequence[str]] = ("0.5",)
    modules: str = "all"
    allocation: str = "uniform"
    damping: float = real(DAMPING, above=0)
    raise_damping: bool = False
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    calibration_tokens: int = whole(65_536, least=1)
    evaluation_tokens: int = whole(32_768, least=16)
    length: int | None = whole(None, least=8, unit="tokens")
    measure: str = "auto"
    distill_tokens: int = whole(0, least=0)
    batch: int = whole(2, least=1)
    lr: float | None = real(None, above=0)
    ce_weight: float = real(0.05, least=0)
    layer_weight: float = real(30.0, least=0)
    decode_contexts: Sequence[int] = whole((512, 4096), least=1)
    seed: int = random_seed()
    device: str = "auto"
    overrides: dict = field(default_factory=dict)

    APART: ClassVar = ("measure",)  # a run goes on with another

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return partial_folder(self.output)

    @property
    def pruning(self) -> dict:
        """The arguments of `oneshot` and `prune_files` that do not differ between the runs that are
        compared.
        """
        names = ("modules", "allocation", "damping", "raise_damping", "length")
        return {name: getattr(self, name) for name in names}


@holds_output(OneShotReport)
def run(job: Job, show: Quiet | None = None) -> OneShotReport:
    """Runs `job`; returns the report, which also lies in the output folder as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), Unsupported (model), FloatingPointError, LinAlgError
    and OSError, each before anything appears under the output's name. Under torchrun or `accelerate
    launch` every process calls it; rank 0 prunes, measures and writes, the others wait and take
    part in the distillation."""
    show, main = show or Quiet(), main_process()
    check_job(job)
    source = folder_of(job.model)
    StreamedModel(Checkpoint(source))  # refuses what cannot be pruned before anything is written
    place = device(job.device)
    check_room("output", job.output, weight_bytes(source))
    with show.stage("reading text"):
        tokenizer = load_tokenizer(source)
        data = streams(
            tokenizer,
            train=max(job.calibration_tokens, job.distill_tokens),
            evaluation=job.evaluation_tokens,
            text=job.text,
            dataset=job.dataset,
            column=job.column,
        )
        if job.distill_tokens > 20 * len(data.train):
            raise ValueError(
                f"distill_tokens: got {job.distill_tokens:,}, the text has {len(data.train):,} "
                "tokens: more than 20 "
                f"passes over it; give more text or at most {20 * len(data.train):,}"
            )
    calibration = data.train[: job.calibration_tokens]
    resume(job.partial / SETTINGS, settings_of(job)) if main else None
    pruned = job.partial / "pruned"
    if main and not pruned.exists():
        with show.stage(
            f"pruning, layer by layer ({job.methods[0]}, {said(job.sparsities[0])})"
        ) as progress:
            prune_files(
                source,
                pruned,
                calibration,
                method=job.methods[0],
                sparsity=job.sparsities[0],
                device=place,
                work=job.partial / "layers",
                progress=progress,
                **job.pruning,
            )
    while not pruned.exists():  # rank 0 is at it
        time.sleep(0.5)
    facts = json.loads((pruned / FACTS).read_text(encoding="utf-8"))
    report = OneShotReport(
        {
            "kind": KIND,
            "settings": settings_of(job) | facts["settings"] | {"source": data.source},
            "model": {},
            "layers": facts["layers"],
            "sizes": {"before": {}, "after": {}},
            "verification": facts["verification"],
            "environment": environment(),
        }
    )
    report.data["sizes"]["before"]["file_bytes"] = weight_bytes(source)
    student = None
    if fits(job, source, place):
        student = _measured(job, source, pruned, data, calibration, report, place, show, main)
    else:
        report.data["settings"]["measure"] = "no: the model does not fit into memory three times"
    if main:
        _save(job, student, tokenizer, pruned, data, report, show)
        discard(job.partial)
    return report


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is looked at. Raises ValueError."""
    for method in job.methods:
        check_choice("methods", method, METHODS)
    for sparsity in job.sparsities:
        for one in [sparsity] if isinstance(sparsity, str) else sparsity:
            Sparsity.parse(one)
    if not job.methods or not job.sparsities:
        raise ValueError("methods, sparsities: got none, valid is at least one of each")
    check_choice("modules", job.modules, layers.MODULES)
    check_choice("allocation", job.allocation, ALLOCATIONS)
    check_choice("measure", job.measure, MEASURE)
    device(job.device)
    check_new_folder("output", job.output)
    if job.distill_tokens and job.measure == "no":
        raise ValueError(
            "distill_tokens: got some with measure 'no'; distillation needs the whole model in "
            "memory"
        )


def folder_of(name: str) -> Path:
    """The checkpoint's folder; a hub name's files are downloaded. ValueError for what does not
    exist.
    """
    found = resolve(name)
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                found, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: got {name!r}, which is no folder, and not found as a hub name: {reason}"
        ) from error


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum((folder / file).stat().st_size for file in set(Checkpoint(folder).files.values()))


def fits(job: Job, source: Path, place: torch.device) -> bool:
    """Whether the model is measured in memory. ValueError where it should be and does not fit."""
    if job.measure == "no":
        return False
    free, needed = available_bytes(place), COPIES * weight_bytes(source)
    room = free is None or needed < 0.8 * free
    if not room and (job.measure == "yes" or job.distill_tokens):
        raise ValueError(
            f"measure: comparing and distilling need about {needed:,} bytes of memory, {free:,} "
            "are free; valid is 'no'"
        )
    return room


def _measured(
    job: Job,
    source: Path,
    pruned: Path,
    data: Streams,
    calibration,
    report: OneShotReport,
    place,
    show,
    main,
):
    """Fills in what needs the models in memory; returns the pruned (and distilled) model."""
    from effattn.evaluate.loss import measure_parent

    with show.stage("loading both models"):
        (parent, _), (student, _) = (load_model(folder) for folder in (source, pruned))
        parent.to(place), student.to(place)
    found = report.data
    length = min(found["settings"]["length"], len(data.evaluation) - 1)
    found["model"] = {
        "class": type(student).__name__,
        "dtype": str(student.dtype).removeprefix("torch."),
    }
    if main:
        found["sizes"]["before"] |= counts(parent)
        found["sizes"]["after"] |= counts(student)
        with show.stage("measuring the dense model") as progress:
            found["quality"] = measure_parent(parent, data, length, progress)
        with show.stage("measuring the pruned model") as progress:
            found["quality"]["pruned"] = compare(
                parent, student, data.evaluation, length, progress=progress
            )
        found["runs"] = [
            {
                "method": job.methods[0],
                "sparsity": said(job.sparsities[0]),
                "seconds": sum(layer["seconds"] for layer in report.layers),
                "errors": [layer["error"] for layer in report.layers],
                **found["quality"]["pruned"],
            },
            *_others(job, parent, calibration, data, length, show),
        ]
    if job.distill_tokens:
        with show.stage(f"distilling on {job.distill_tokens:,} tokens, zeros kept") as progress:
            found["distillation"] = _distill(job, student, parent, data, length, progress)
        if main:
            found["sizes"]["after"] |= counts(student)
            with show.stage("measuring the distilled model") as progress:
                found["quality"]["distilled"] = compare(
                    parent, student, data.evaluation, length, progress=progress
                )
    if main and job.decode_contexts:
        with show.stage("timing decode steps") as progress:
            timed = decode_speed(
                {"before": parent, "after": student}, list(job.decode_contexts), progress=progress
            )
        rows: dict[int, dict] = {}
        for row in timed:
            rows.setdefault(row["context"], {"context": row["context"]})[row.pop("model")] = row
        found["decode"] = list(rows.values())
    return student


def _others(job: Job, parent, calibration, data: Streams, length: int, show) -> list[dict]:
    """The other methods and sparsities, each on a copy of the dense model, measured."""
    rows = []
    for sparsity in job.sparsities:
        for method in job.methods:
            if (method, sparsity) == (job.methods[0], job.sparsities[0]):
                continue
            with show.stage(f"{method}, {said(sparsity)}") as progress:
                start, other = time.perf_counter(), copy.deepcopy(parent)
                report = oneshot(
                    other,
                    calibration,
                    method=method,
                    sparsity=sparsity,
                    progress=progress,
                    **job.pruning,
                )
                seconds = time.perf_counter() - start
                quality = compare(parent, other, data.evaluation, length)
            errors = [layer["error"] for layer in report.layers]
            rows.append(
                {
                    "method": method,
                    "sparsity": said(sparsity),
                    "seconds": seconds,
                    "errors": errors,
                    **quality,
                }
            )
    return rows


def _distill(job: Job, student, parent, data: Streams, length: int, progress) -> dict:
    """KL to the dense model on the layers' weights that are not zero. Returns what `uptrain`
    does.
    """
    from effattn.hf import anatomy as hf
    from effattn.training.uptrain import default_lr, uptrain

    lr = job.lr or LR * default_lr(student.get_input_embeddings().weight.shape[1])
    with keep_zeros(student):
        return uptrain(
            student,
            parent,
            data.train,
            train_tokens=job.distill_tokens,
            folder=job.partial / "distill",
            evaluation=data.evaluation[:8_192],
            length=length,
            batch=job.batch,
            lr=lr,
            ce_weight=job.ce_weight,
            layer_weight=job.layer_weight,
            seed=job.seed,
            progress=progress,
            trainable=[p for layer in hf.of(student) for p in layer.block.parameters()],
            overrides={"use_cpu": student.device.type == "cpu"} | job.overrides,
        )


def _save(
    job: Job, student, tokenizer, pruned: Path, data: Streams, report: OneShotReport, show
) -> None:
    with (
        show.stage("saving, and loading again without effattn"),
        atomic_folder(job.output) as folder,
    ):
        if job.distill_tokens:
            student.config.use_cache = True
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            for file in pruned.iterdir():
                if file.name != FACTS:  # the report has them
                    _link(file, folder / file.name)
        report.data["sizes"]["after"]["file_bytes"] = weight_bytes(folder)
        if student is not None:
            report.data["verification"] = verify_plain(folder, student, data.evaluation[:64])
        report.save(folder)


def _link(file: Path, other: Path) -> None:
    """A second name of a file, which takes no room; a copy where the file system has only one. The
    first one stays: a run that is killed before its output has its name goes on from there."""
    try:
        os.link(file, other)
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.ENOTSUP,
            errno.EOPNOTSUPP,
            errno.EMLINK,
            errno.EXDEV,
            errno.ENOSYS,
        ):
            raise
        shutil.copyfile(file, other)
