r"""From a budget to a checkpoint: what each layer becomes so that the whole harms least within it.

    python recipes/fit.py --bytes 60% --context 2048 --batch 4 --output runs/fit
    python recipes/fit.py --model M --kv-bytes-per-token 8KiB --keep weights --output runs/fit
    python recipes/fit.py --bytes 60% --frontier --output runs/frontier

`--help` lists every option; the same command is `effattn fit`. From Python:

    from effattn.recipes.fit import Settings, run
    report = run(Settings(bytes="60%", output=Path("runs/fit")))

Measure every candidate in its layer, time them where speed is a limit, solve for the plan, measure
it as a whole and solve again, build it, distil on demand, measure it and the uniform plans on text
that nothing was chosen on, and save: the output has its name only when what was saved gives the
same logits. `.<output>.partial` beside it holds what an unfinished run has measured; the same
command goes on from there, also with another budget. `--measured FILE` is kept instead, for others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import contexts_of, names, option, real, tokens, whole
from effattn.resuming import Parts
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.fitting.groups import Space
    from effattn.fitting.report import FitReport
    from effattn.fitting.search import Found
    from effattn.fitting.session import Asked, Session
    from effattn.textdata import Streams

POINTS = 12  # of the whole curve
RETRIEVAL = 2048  # tokens of a prompt, at most
COUNTED = 4096  # tokens, at most, that a cache is filled with to count its bytes
DEPTHS = (0.1, 0.5, 0.9)


@dataclass
class Settings(options.Saving):
    """Fit a checkpoint to a budget: bytes, cache, parameters or speed; each layer becomes what
    harms the whole least.
    """

    output: Path = option(help="new folder for the checkpoint and its report")
    model: str = options.model_name()
    bytes: str | None = option(
        None, "of weights, cache and a step's activations: 6GiB, 500MB or 60%"
    )
    kv_bytes_per_token: str | None = option(None, "that the cache grows by: 8KiB or 25%")
    weight_bytes: str | None = option(None, "of the weights: 4GiB or 50%")
    parameters: str | None = option(None, "at most: 100M, 1.5B or 80%")
    tokens_per_s: str | None = option(None, "decoded by the batch here, at least: 40 or 120%")
    context: int | None = whole(
        None,
        "tokens in the cache, 32k for example (default: as trained)",
        least=1,
        read=lambda name, text: next(iter(contexts_of(str(text), name)), None),
    )
    batch: int = whole(1, "sequences in the cache", least=1)
    frontier: bool = option(False, f"search {POINTS} budgets instead, and save no checkpoint")
    allow: Sequence[str] = names(
        (),
        "axes to search: heads,latent,skip,cache,window,ffn,weights,projections,sparsity "
        "(default: all)",
    )
    forbid: Sequence[str] = names((), "axes to leave out")
    keep: str | None = option(None, "what stays as it is: weights, or cache")
    text: Sequence[Path] = options.text_files("to calibrate on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = tokens(16_384, "to fit candidates to", least=1)
    score_tokens: int = tokens(4096, "to measure harm on", least=2)
    evaluation_tokens: int = tokens(8192, "held out, to measure the plan on", least=2)
    recover_tokens: int = tokens(0, "to distil on afterwards; 0: none")
    recover_batch: int = whole(2, "distillation windows a step and process", least=1)
    lr: float | None = real(None, "peak learning rate (default: by width and depth)", above=0)
    length: int = whole(512, "window length in tokens", least=8, unit="tokens")
    rounds: int = whole(8, "plans measured as wholes, at most", least=1)
    retrieval_trials: int = whole(8, "prompts a task and depth; 0: no retrieval", least=0)
    decode_steps: int = whole(8, "decoding steps to time; 0: not timed", least=0)
    seed: int = options.random_seed("data order and prompts")
    device: str = options.device_name()
    measured: Path | None = option(
        None, "file that keeps what was measured, for runs with other budgets"
    )
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "fit"
    LIMITS: ClassVar = (
        "bytes",
        "kv_bytes_per_token",
        "weight_bytes",
        "parameters",
        "tokens_per_s",
    )
    # what was measured serves other budgets
    APART: ClassVar = (*LIMITS, "batch", "rounds", "decode_steps", "frontier", "measured")
    WIDTH: ClassVar = 140

    @property
    def partial(self) -> Path:
        return flow.partial_folder(self.output)

    @property
    def parts(self) -> Path:
        """The file of what was measured."""
        return self.measured or self.partial / "parts.json"

    @property
    def saves(self) -> bool:
        """Whether one plan is built."""
        return not self.frontier

    @property
    def asked(self) -> Asked:
        """How to search."""
        from effattn.fitting.session import Asked

        return Asked(
            tuple(self.allow) or None,
            tuple(self.forbid),
            self.keep,
            self.length,
            self.score_tokens,
            self.bos,
        )


def run(settings: Settings, show: Quiet | None = None) -> FitReport:
    """Fits; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input, a budget that no plan meets, or that the parent
    meets), RuntimeError (the saved checkpoint is another model) and OSError (disk), each before
    anything appears under the output's name."""
    from effattn.fitting.report import FitReport

    with flow.output_of(settings, FitReport, show) as finished:
        if finished:
            return FitReport.load(settings.output)
        return fit(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def fit(settings: Settings, show: Quiet) -> FitReport:
    """The fit, step by step."""
    from effattn.fitting import facts
    from effattn.fitting.groups import STEP
    from effattn.fitting.report import FitReport
    from effattn.fitting.session import Session

    budget = check(settings)
    parent, tokenizer = load(settings, show)
    text = read(settings, show, tokenizer)
    with show.stage("measuring the parent") as progress:
        calibration = text.train[: settings.calibration_tokens + settings.score_tokens]
        session = Session(parent, budget, calibration, settings.asked, progress)
    flow.check_unfinished(settings, begin=True)
    made_with = flow.made_with(parent, "torch", "transformers")
    kept = Parts(settings.parts, settings.kept(), made_with, "fit")

    # What each candidate takes of a step's time, where that is a limit; then what it harms, alone
    # in its layer and re-fitted.
    if STEP in budget.given:
        with show.stage("timing candidates") as progress:
            session.time(kept, progress)
    count = sum(len(values) for ladder in session.ladders for values in ladder.values())
    with show.stage(f"measuring {count} candidates") as progress:
        space = session.space(kept, progress)

    report = FitReport(facts.begin(settings.kept(), session, space, text))
    if settings.frontier:
        report.data["frontier"] = curve(settings, show, kept, session, space)
    else:
        found = plan(settings, show, kept, session, space)
        report.data |= facts.plan_of(session, space, found, session.rounding(kept))
        finish(settings, show, kept, report, session, found, tokenizer, text)
    with flow.saving(settings, show, report) as folder:
        if not settings.frontier:
            save(settings, folder, report, session, tokenizer, text)
    flow.discard(settings.partial)
    return report


def check(settings: Settings):
    """The budget. Everything that can be known to be wrong before a model is loaded. Raises
    ValueError."""
    from effattn.fitting.budget import Budget
    from effattn.fitting.candidates import axes_of
    from effattn.outputs import check_new_folder

    limits = {name: getattr(settings, name) for name in settings.LIMITS}
    budget = Budget(**limits, context=settings.context, batch=settings.batch)
    axes_of(settings.asked.allow, settings.asked.forbid, settings.keep)
    flow.device(settings.device)
    if settings.frontier:
        check_curve(list(budget.given))
    if settings.frontier and settings.recover_tokens:
        raise ValueError(
            f"recover_tokens: got {settings.recover_tokens:,} with frontier, which builds no "
            "checkpoint; valid there is 0"
        )
    check_new_folder("output", settings.output)
    flow.check_unfinished(settings, begin=False)
    return budget


def check_curve(limits: Sequence[str]) -> None:
    """ValueError for limits that no curve can go along: several, or of speed, whose parts add up
    too roughly for a grid."""
    valid = [name for name in Settings.LIMITS if name != "tokens_per_s"]
    if len(limits) > 1 or limits[0] not in valid:
        raise ValueError(
            f"frontier: got limits of {', '.join(limits)}; a curve goes along one, valid is one of "
            f"{', '.join(valid)}"
        )


def load(settings: Settings, show: Quiet) -> tuple:
    """The parent on its device, and its tokenizer."""
    from effattn.fitting.session import check_model
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import check_room
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        parent, tokenizer = load_model(settings.model, bos=settings.bos)
        parent.to(flow.device(settings.device))
        check_model(parent)
        if not settings.frontier:
            check_room("output", settings.output, weight_bytes(parent) // 2)
    return parent, tokenizer


def read(settings: Settings, show: Quiet, tokenizer) -> Streams:
    """The text to fit to and to measure on, each apart."""
    from effattn.textdata import streams

    with show.stage("reading text"):
        searched = settings.calibration_tokens + settings.score_tokens
        text = streams(
            tokenizer,
            train=max(searched, settings.recover_tokens),
            evaluation=settings.evaluation_tokens + 1,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
        text.check_passes("recover_tokens", settings.recover_tokens)
        if settings.evaluation_tokens < settings.length:
            raise ValueError(
                f"evaluation_tokens: got {settings.evaluation_tokens:,}, valid is at least length "
                f"({settings.length:,}): one window"
            )
    return text


def plan(settings: Settings, show: Quiet, kept: Parts, session: Session, space: Space) -> Found:
    """The plan, solved for and measured, until it does not become better."""
    from effattn.fitting.search import search

    with show.stage("solving, and measuring whole plans") as progress:
        return search(
            space,
            session.limits(),
            session.measure(kept),
            rounds=settings.rounds,
            progress=progress,
        )


def curve(
    settings: Settings, show: Quiet, kept: Parts, session: Session, space: Space
) -> list[dict]:
    """The best plan at each of many budgets of the first limit."""
    from effattn.fitting.frontier import points

    row = next(iter(session.budget.given))
    with show.stage(f"searching {POINTS} budgets") as progress:
        return points(space, session.measure(kept), POINTS, row, progress=progress)


def finish(
    settings: Settings,
    show: Quiet,
    kept: Parts,
    report: FitReport,
    session: Session,
    found: Found,
    tokenizer,
    text: Streams,
) -> None:
    """Builds the plan, distils it on demand, and measures it beside the parent and uniform plans;
    the report has the model under `built`."""
    from effattn.fitting import facts
    from effattn.fitting.building import finish as carry_out
    from effattn.fitting.harm import Judge

    with show.stage("building the plan") as progress:
        shaped = session.builder.shaped(found.best.plan, progress)
    if settings.recover_tokens:
        shaped, report.data["recovery"] = recover(settings, show, session, shaped, found, text)
    report.built = carry_out(shaped, found.best.plan, session.builder.parent)

    with show.stage("measuring the parent on other text") as progress:
        held_out = (text.evaluation, session.length, settings.bos)
        judge = Judge(session.parts.model, *held_out, progress)
    lanes = facts.lanes(session, found, report.built)
    rows = report.data["plans"]
    for name, (made, totals) in lanes.items():
        model = made()
        again = "recovered/" if settings.recover_tokens and name == facts.PLAN else ""
        key = f"{again}{totals['key']}"
        stage, part = f"measuring {name}", f"quality/{key}"
        quality = flow.part(show, kept, stage, part, judge.of, model, piece=1)
        row = {"name": name, "bytes": totals["bytes"], **quality}
        if settings.retrieval_trials and name in (facts.PARENT, facts.PLAN):
            row |= retrieval(settings, show, kept, session, model, name, key, tokenizer)
        rows.append(row)
    if settings.decode_steps:
        with show.stage("timing decoding steps") as progress:
            models = {name: made() for name, (made, _) in lanes.items()}
            facts.add_speed(rows, session, models, settings.decode_steps, progress)


def recover(
    settings: Settings, show: Quiet, session: Session, shaped, found: Found, text: Streams
) -> tuple:
    """(the shaped model, trained towards the parent; what was done)."""
    from effattn.fitting import recovery
    from effattn.training.uptrain import uptrain

    # of this plan alone: a run that was killed may be gone on with under another budget
    key = hashlib.sha256(found.best.plan.key().encode()).hexdigest()[:16]

    def train(student, layers) -> dict:
        with show.stage(f"distilling on {settings.recover_tokens:,} tokens") as progress:
            return uptrain(
                student,
                session.parts.model,
                text.train,
                train_tokens=settings.recover_tokens,
                folder=settings.partial / f"recover-{key}",
                evaluation=text.evaluation[: settings.evaluation_tokens],
                length=session.length,
                batch=settings.recover_batch,
                lr=settings.lr,
                trainable=layers,
                seed=settings.seed,
                progress=progress,
                overrides={"use_cpu": student.device.type == "cpu"} | settings.overrides,
            )

    return recovery.recover(shaped, found.best.plan, session.builder.parent, train)


def retrieval(
    settings: Settings, show: Quiet, kept: Parts, session: Session, model, name, key, tokenizer
) -> dict:
    """What a model still finds far back: {passkey, recall}, shares of all prompts; None where the
    prompt does not fit or the tokenizer has no words for it."""
    from effattn import embedded
    from effattn.quant.sensitivity.lanes import Lane
    from effattn.quant.sensitivity.retrieval import TASKS, ask

    length = min(3 * (session.parts.trained_length or session.length) // 4, RETRIEVAL)
    style = "code" if str(settings.model) == embedded.NAME else "text"
    found: dict[str, float | None] = {}
    for column, task in zip(("passkey", "recall"), TASKS, strict=True):
        how = {"trials": settings.retrieval_trials, "style": style, "seed": settings.seed}
        asked = (task, Lane(name, None, model), tokenizer, length, DEPTHS)
        told = flow.part(show, kept, f"{task}: {name}", f"{task}/{key}", ask, *asked, **how)
        found[column] = told.get("score")
    return found


def save(
    settings: Settings, folder: Path, report: FitReport, session: Session, tokenizer, text: Streams
) -> None:
    """The checkpoint, proven by its logits and counted to the byte."""
    from effattn.fitting import facts
    from effattn.surgery import checkpoint

    checkpoint.save(report.built, folder, tokenizer)
    ids = text.evaluation[: min(64, session.length)]
    again, report.data["verification"] = checkpoint.load_again(folder, report.built, ids)
    facts.count(report, session, again, COUNTED)


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
