"""The whole job behind `effattn extend`: a plan, and on demand a checkpoint with the rule, tuned or
not.

Load, plan, and without an output stop there. With one: measure, apply the rule, measure, tune,
measure, save, load again and compare logits; only then the folder gets its name.
`.<output>.partial` beside it keeps the checkpoints of an unfinished tuning; the same command goes
on from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from effattn import embedded, outputs
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import Unsupported, check_choice
from effattn.evaluate.curve import scores, token_scores
from effattn.extending import planner, texts
from effattn.extending.report import ExtendReport
from effattn.hf import anatomy, positions
from effattn.hf.weights import weight_bytes
from effattn.outputs import atomic_folder, check_new_folder
from effattn.position_sampling import METHODS
from effattn.positions.registry import parse
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
from effattn.surgery.checkpoint import load_again, load_model, save
from effattn.surgery.describing import describe
from effattn.surgery.swapping import active, restore, swap
from effattn.textdata import Streams, streams
from effattn.training import lending as training
from effattn.training.lora import check_peft

WHOLE = "none"  # windows as long as the target
SAMPLING = (*METHODS, WHOLE)


@dataclass
class Job(Checked):
    """The settings of one run. A tuning is resumed only with the same ones.

    to: tokens to read. rule: a spec of `effattn.positions`, or a name from the plan; None: the
    recommended one. tune_tokens: budget of the fine-tuning. sampling: "pose", "random" or "none",
    see `effattn.extending.tuning`. window: tokens of a training window (None: the trained length,
    or `to` without sampling). sequences: held-out stretches of `to` tokens to measure on, before
    and after; 0: none."""

    model: str = embedded.NAME
    to: int = 0
    rule: str | None = None
    output: Path | None = None
    tune_tokens: int = whole(0, least=0)
    sampling: str = "pose"
    window: int | None = whole(None, least=8)
    lora: int = whole(0, least=0)
    batch: int = whole(1, least=1)
    lr: float | None = real(None, above=0)
    sequences: int = whole(2, least=0)
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    seed: int = random_seed()
    device: str = "auto"
    overrides: dict = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run."""
        return partial_folder(self.output or "runs/extend")


@holds_output(ExtendReport)
def run(job: Job, show: Quiet | None = None) -> ExtendReport:
    """Runs `job`; returns the report, which with an output also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), RuntimeError (the saved checkpoint computes something
    else), OSError (disk), each before anything appears under the output's name. Under torchrun or
    `accelerate launch` every process calls it; rank 0 measures and writes."""
    show, main = show or Quiet(), main_process()
    check_job(job)
    with show.stage("loading the model"):
        model, tokenizer = load_model(job.model)
        model.to(device(job.device))
        if active(model) is not None:
            raise Unsupported(
                f"model: {job.model} is swapped already; valid is a checkpoint with its own "
                "attention"
            )
        if job.output is not None:
            outputs.check_room("output", job.output, weight_bytes(model))
        plan = planner.make_plan(model, job.to, tuned=bool(job.tune_tokens))
        spec, plain = _rule(job, model, plan)
        window = _window(job, plan, spec, plain)
        # attention with a rule of its own, which refuses dropout, say
        if job.tune_tokens and not plain:
            swap(model, positions=spec)
            try:
                training.rehearse(model)
            finally:
                restore(model)
    data = None
    if job.output is not None and (job.sequences or job.tune_tokens):
        with show.stage("reading text"):
            data = streams(
                tokenizer,
                train=max(job.tune_tokens, 2 * window),
                evaluation=job.sequences * job.to + 1,
                text=job.text,
                dataset=job.dataset,
                column=job.column,
            )
            _check_text(job, data, window)
    quality, tuned, verification, files = [], None, None, None

    def measure(stage: str) -> None:
        if main and job.sequences:
            with show.stage(f"measuring {stage}") as progress:
                quality.append(
                    {"stage": stage, "lengths": _measured(model, data.evaluation, plan, progress)}
                )

    if job.output is not None:
        if job.tune_tokens:
            check_partial(job, main)
        measure("before")
        swap(model, positions=spec)
        measure("with the rule")
        if job.tune_tokens:
            from effattn.extending.tuning import tune

            with show.stage(f"tuning on {job.tune_tokens:,} tokens") as progress:
                tuned = tune(
                    model,
                    data.train,
                    target=job.to,
                    window=window,
                    train_tokens=job.tune_tokens,
                    folder=job.partial / "tuning",
                    sampling=None if job.sampling == WHOLE else job.sampling,
                    batch=job.batch,
                    lr=job.lr,
                    lora=job.lora,
                    seed=job.seed,
                    progress=progress,
                    overrides={"use_cpu": model.device.type == "cpu"} | job.overrides,
                )
            measure("after tuning")
    told = describe(model)
    settings = json.loads(json.dumps(asdict(job), default=str)) | {
        "source": data.source if data else None
    }
    report = ExtendReport(
        {
            "kind": "extend",
            "settings": settings,
            "plan": plan.to_dict(),
            "rule": {"spec": spec, "plain": plain},
            "model": {
                "class": told.model,
                "dtype": told.dtype,
                "parameters": told.parameters["total"],
            },
            "quality": quality,
            "tuning": tuned,
            "verification": verification,
            "environment": environment(),
        }
    )
    if main and job.output is not None:
        with show.stage("saving, and loading again"), atomic_folder(job.output) as folder:
            model.config.use_cache = True
            save(model, folder, tokenizer)
            ids = (
                torch.arange(min(256, plan.trained)) % model.get_input_embeddings().weight.shape[0]
            )
            _, verification = load_again(folder, model, ids)
            files = sorted(file.name for file in folder.iterdir())
            report.data["verification"] = verification | {"files": ", ".join(files)}
            report.save(folder)
        discard(job.partial)
    return report


def check_job(job: Job) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    device(job.device)
    check_choice("sampling", job.sampling, SAMPLING)
    if type(job.to) is not int or job.to < 1:
        raise ValueError(f"to: got {job.to}, valid is a whole number of at least 1")
    if job.lora and not job.tune_tokens:
        raise ValueError(
            f"lora: got {job.lora} without tune_tokens; valid is 0, or a budget to train on"
        )
    if job.tune_tokens and job.output is None:
        raise ValueError(
            "tune_tokens: given without output; name the folder for the tuned checkpoint"
        )
    if job.lora:
        check_peft()
    if job.output is not None:
        check_new_folder("output", job.output)


def _rule(job: Job, model, plan: planner.Plan) -> tuple[str, bool]:
    """(the spec to apply, whether plain transformers computes it). Raises what the rule's parts
    raise.
    """
    named = plan.candidate(job.rule) if job.rule else plan.recommended
    spec = job.rule if named is None else named.spec
    parse(spec)
    order = positions.make(anatomy.of(model), spec)
    return spec, spec == "rope" or order.config is not None


def _window(job: Job, plan: planner.Plan, spec: str, plain: bool) -> int:
    """Tokens of a training window. ValueError for what cannot be trained so."""
    whole = job.sampling == WHOLE
    window = job.window or (job.to if whole else plan.trained)
    if window > job.to:
        raise ValueError(f"window: got {window}, valid is at most the target ({job.to})")
    if job.tune_tokens and not (plain or whole):
        raise ValueError(
            f"sampling: got {job.sampling!r}, and {spec!r} counts positions by itself; valid is "
            "'none' (windows of the "
            "target length), or a rule that transformers has, such as yarn"
        )
    return window


def _check_text(job: Job, data: Streams, window: int) -> None:
    if len(data.evaluation) < job.sequences * job.to + 1:
        raise ValueError(
            f"sequences: {job.sequences} of {job.to:,} tokens are asked for, {data.source} holds "
            "out "
            f"{len(data.evaluation):,} tokens; ask for fewer (0: none), or give more text"
        )
    if job.tune_tokens and len(data.train) < 2 * window:
        raise ValueError(
            f"text: it has {len(data.train):,} training tokens, windows of {window:,} need twice "
            "that"
        )


def _measured(model, tokens: torch.Tensor, plan: planner.Plan, progress) -> list[dict]:
    """The same tokens in windows of the trained length and of the target: a dict of scores each."""
    count, found = (len(tokens) - 1) // plan.target, []
    whole = tokens[: count * plan.target + 1].unfold(0, plan.target + 1, plan.target)
    for length in (plan.trained, plan.target):
        cut = whole[:, : plan.target // length * length + 1]
        rows = texts.windows(cut, length)
        found.append({"length": length, **scores(*token_scores(model, rows, progress=progress))})
    return found
