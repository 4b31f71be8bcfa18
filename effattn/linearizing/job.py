"""The whole job behind `recipes/linearize.py` and `effattn linearize`.

Load, measure the parent, swap, measure, transfer, measure, distil, measure, save, load again and
compare logits; only then the folder gets its name. `.<output>.partial` beside it keeps the
checkpoints of both trainings; the same command goes on from there."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from effattn import embedded, outputs
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import check_choice
from effattn.evaluate.loss import compare, measure_parent
from effattn.hf import anatomy as hf
from effattn.hf.adapters import require_own_weights
from effattn.hf.weights import weight_bytes
from effattn.linearizing import plan
from effattn.linearizing.approximation import METHODS, measure_approximation
from effattn.linearizing.report import LinearizeReport
from effattn.outputs import atomic_folder, check_new_folder
from effattn.profiling.environment import environment
from effattn.recipes.jobs import (
    Quiet,
    check_partial,
    device,
    discard,
    holds_output,
    main_process,
    partial_folder,
)
from effattn.specs import parse_spec
from effattn.surgery.checkpoint import load_again, load_model, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active
from effattn.swapping.patterns import label_of
from effattn.textdata import Streams, streams
from effattn.training.lora import adapters, check_peft
from effattn.training.transfer import TRAINABLE, learnable, transfer
from effattn.training.uptrain import TRAINABLE as DISTIL_TRAINABLE
from effattn.training.uptrain import default_lr, uptrain

STATE_CONTEXTS = (1024, 8192, 65536)
DEFAULT = "runs/linearize"  # where a run without an output trains
LR = 2 / 3  # of what suits uptraining with twice the windows a step


@dataclass
class Job(Checked):
    """The settings of one run. A run is resumed only with the same ones."""

    model: str = embedded.NAME
    output: Path | None = None
    pattern: str | None = "linear(feature_map='hedgehog')"
    projections: str | None = None
    keep_every: int = whole(0, least=0)
    keep: str = "sliding(window=256)"
    fit_decay: bool = True
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    transfer_tokens: int = whole(150_000, least=0)
    distil_tokens: int = whole(450_000, least=0)
    evaluation_tokens: int = whole(32_768, least=16)
    length: int = whole(512, least=8)
    batch: int = whole(1, least=1)
    transfer_lr: float = real(3e-3, above=0)
    lr: float | None = real(None, above=0)
    transfer_trainable: str = "attention"
    trainable: str = "attention"
    lora: int = whole(0, least=0)
    ce_weight: float = real(0.05, least=0)
    layer_weight: float = real(30.0, least=0)
    seed: int = random_seed()
    device: str = "auto"
    overrides: dict = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return partial_folder(self.output or DEFAULT)


@holds_output(LinearizeReport, DEFAULT)
def run(job: Job, show: Quiet | None = None) -> LinearizeReport:
    """Runs `job`; returns the report, which with an output also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, OSError (disk), each before
    anything appears under the output's name. Under torchrun or `accelerate launch` every process
    calls it; rank 0 measures and writes."""
    show, main = show or Quiet(), main_process()
    check_job(job)
    with show.stage("loading the model"):
        parent, tokenizer = load_model(job.model)
        parent.to(device(job.device))
        if active(parent) is not None:
            raise ValueError(
                f"model: {job.model} is swapped already; valid is a checkpoint with its own "
                "attention"
            )
        require_own_weights(parent)
        parts = hf.of(parent)
        if job.output is not None:
            # structured projections may be smaller
            outputs.check_room("output", job.output, weight_bytes(parent) // 2)
        specs = plan.layer_specs(parts, job.pattern, job.keep_every, job.keep)
        trains = bool(job.transfer_tokens or job.distil_tokens)
        if trains and specs:
            plan.check_trains(parent, specs)
    with show.stage("reading text"):
        wanted = max(job.transfer_tokens, job.distil_tokens, plan.WINDOWS * plan.LENGTH)
        data = streams(
            tokenizer,
            train=wanted,
            evaluation=job.evaluation_tokens,
            text=job.text,
            dataset=job.dataset,
            column=job.column,
        )
        for name in ("transfer_tokens", "distil_tokens"):
            if getattr(job, name) > 20 * len(data.train):
                raise ValueError(
                    f"{name}: got {getattr(job, name):,}, the text has {len(data.train):,} "
                    "tokens: more than 20 passes "
                    "over it; give more text, or ask for less"
                )
    length = min(job.length, len(data.evaluation))
    student = copy.deepcopy(parent)
    with show.stage("swapping"):
        specs = plan.apply(student, specs, job.projections, data.train, fit_decay=job.fit_decay)
        layers = plan.learning_layers(student, specs, job.projections)
        if not layers:
            raise ValueError(
                f"pattern: {label_of(job.pattern)} is exact in every layer, there is nothing to "
                "recover; "
                "valid is an approximate backend, or use `effattn swap`"
            )
        if job.transfer_tokens:
            learnable(student, layers, job.transfer_trainable)
    if trains:
        check_partial(job, main)
    quality, stages, approximation = {}, {}, None
    if main:
        with show.stage("measuring the parent") as progress:
            quality = measure_parent(parent, data, length, progress)
        with show.stage("error against exact attention, by budget") as progress:
            methods = {parse_spec(specs[layer])[0] for layer in plan.approximate(specs)}
            methods = [
                name
                for name in METHODS
                if name in methods or (name == "monarch" and job.projections)
            ]
            span = min(plan.LENGTH, len(data.train) // 4)
            approximation = measure_approximation(
                parent,
                data.train[: 4 * span],
                methods=methods,
                length=span,
                seed=job.seed,
                progress=progress,
            ).data

    def measured(stage: str) -> None:
        if main:
            with show.stage(f"measuring after {stage}") as progress:
                stages[stage] = compare(parent, student, data.evaluation, length, progress=progress)

    measured("swap")
    told, transferred, distilled = describe(student), None, None
    if job.transfer_tokens:
        with show.stage(f"attention transfer on {job.transfer_tokens:,} tokens") as progress:
            transferred = transfer(
                student,
                parent,
                data.train,
                layers=layers,
                train_tokens=job.transfer_tokens,
                folder=job.partial / "transfer",
                length=length,
                batch=job.batch,
                lr=job.transfer_lr,
                trainable=job.transfer_trainable,
                seed=job.seed,
                progress=progress,
                overrides=_overrides(job, student),
            )
        measured("transfer")
    if job.distil_tokens:
        with show.stage(f"distilling on {job.distil_tokens:,} tokens") as progress:
            distilled = _distil(job, student, parent, data, length, progress)
        measured("distillation")
    report = LinearizeReport(
        {
            "kind": "linearize",
            "settings": json.loads(json.dumps(asdict(job), default=str)) | {"source": data.source},
            "model": {
                "class": told.model,
                "parameters_before": describe(parent).parameters["total"],
                "parameters_after": told.parameters["total"],
                "dtype": told.dtype,
            },
            "layers": [
                {
                    "layer": row["index"],
                    "pattern": row["pattern"],
                    "projections": row["projections"],
                }
                for row in told.layers
            ],
            "quality": quality,
            "stages": stages,
            "transfer": transferred,
            "distillation": distilled,
            "approximation": approximation,
            "pretraining_tokens": embedded.card()["train_tokens"]
            if job.model == embedded.NAME
            else None,
            "state_bytes": plan.state_bytes(student, STATE_CONTEXTS),
            "verification": None,
            "environment": environment(),
        }
    )
    if main and job.output is not None:
        with show.stage("saving, and loading again"), atomic_folder(job.output) as folder:
            student.config.use_cache = True
            save(student, folder, tokenizer)
            _, report.data["verification"] = load_again(
                folder, student, data.evaluation[: min(64, length)]
            )
            report.save(folder)
    if main:
        discard(job.partial)
    return report


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    check_choice("transfer_trainable", job.transfer_trainable, TRAINABLE)
    check_choice("trainable", job.trainable, DISTIL_TRAINABLE)
    device(job.device)
    if job.output is not None:
        check_new_folder("output", job.output)
    if job.pattern is None and job.projections is None:
        raise ValueError(
            "pattern: got none and no projections either; valid is for example "
            "'performer(features=256)'"
        )
    if job.lora and job.distil_tokens:
        check_peft()


def _overrides(job: Job, student) -> dict:
    return {"use_cpu": student.device.type == "cpu"} | job.overrides


def _distil(job: Job, student, parent, data: Streams, length: int, progress) -> dict:
    hidden = student.get_input_embeddings().weight.shape[1]

    def train(trainable) -> dict:
        return uptrain(
            student,
            parent,
            data.train,
            train_tokens=job.distil_tokens,
            folder=job.partial / "distil",
            evaluation=data.evaluation[:8_192],
            length=length,
            batch=job.batch,
            lr=job.lr or LR * default_lr(hidden),
            ce_weight=job.ce_weight,
            layer_weight=job.layer_weight,
            trainable=trainable,
            seed=job.seed,
            progress=progress,
            overrides=_overrides(job, student),
        )

    if not job.lora:
        return train(job.trainable)
    with adapters(student, job.lora) as parameters:
        return train(parameters)
