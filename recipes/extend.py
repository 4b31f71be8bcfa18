r"""A longer context for a checkpoint: what each position rule promises, which to take, and the
checkpoint with it, tuned or not.

    python recipes/extend.py --to 32k
    python recipes/extend.py --model M --to 32k --output DIR
    accelerate launch recipes/extend.py --model M --to 32k --tune-tokens 50M --output DIR

`--help` lists every option; the same command is `effattn extend`. From Python:

    from effattn.recipes.extend import Settings, run
    report = run(Settings(to=32768, model="embedded"))

Load, plan, and without an output stop there. With one: measure, apply the rule, measure, tune,
measure, save, load again and compare logits; only then the folder has its name.
`.<output>.partial` beside it keeps the checkpoints of an unfinished tuning; the same command goes
on from there.

Under torchrun or `accelerate launch` every process loads, all tune together, and rank 0 measures
and writes. `recipes/extend_context.py` sets all rules side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import contexts_of, option, real, tokens, whole
from effattn.resuming import as_json
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.extending.planner import Plan
    from effattn.extending.report import ExtendReport
    from effattn.textdata import Streams

WHOLE = "none"  # as a sampling: windows as long as the target


def one_length(name: str, text: str) -> int:
    """ "32k" as a number; `contexts_of` takes several."""
    lengths = contexts_of(text, name)
    if len(lengths) != 1:
        raise ValueError(
            f"{name}: got {text!r}, valid is one number of tokens, such as 32768 or 32k"
        )
    return lengths[0]


@dataclass
class Settings(options.Saving):
    """Plan a longer context: what each position rule promises, which to take, and the checkpoint,
    tuned if need be.
    """

    to: int = option(help="tokens that the model is to read, such as 32768 or 32k", read=one_length)
    model: str = options.model_name()
    rule: str | None = option(
        None,
        'a rule such as "yarn(length=4096)" or "rerope(window=192)+logn", or a name from the plan '
        "(default: the recommended one)",
    )
    output: Path | None = option(
        None, "new folder for the checkpoint and its report; without it, only the plan is printed"
    )
    tune_tokens: int = tokens(0, "to fine-tune on; 0: none")
    sampling: str = option(
        "pose",
        "positions while tuning: pose, random, or none (windows as long as the target)",
    )
    memory: str | None = option(
        None,
        "pattern of a tuning in windows that follow each other, each with the memory of those "
        "before, such as 'block(block=512, look_back=1)'; without sampling",
    )
    window: int | None = whole(
        None,
        "tokens of a training window (default: the trained length; without sampling the target)",
        least=8,
    )
    lora: int = whole(
        0, "rank of LoRA adapters to tune instead (needs peft); 0: all weights", least=0
    )
    batch: int = whole(1, "windows a step and process", least=1)
    lr: float | None = real(None, "peak learning rate (default: by width)", above=0)
    sequences: int = whole(
        2, "held-out stretches of the target length to measure on; 0: none", least=0
    )
    text: Sequence[Path] = options.text_files("to tune and measure on", "more")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    seed: int = options.random_seed("the data's order and the positions")
    device: str = options.device_name()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "extend"
    WIDTH: ClassVar = 160

    @property
    def partial(self) -> Path:
        return flow.partial_folder(self.output or "runs/extend")


def run(settings: Settings, show: Quiet | None = None) -> ExtendReport:
    """Plans, and with an output extends; returns the report, which then also lies there as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), RuntimeError (the saved checkpoint computes something
    else), OSError (disk), each before anything appears under the output's name."""
    from effattn.extending.report import ExtendReport

    with flow.output_of(settings) as finished:
        if finished:
            return ExtendReport.load(settings.output)
        return extend(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def extend(settings: Settings, show: Quiet) -> ExtendReport:
    """The extension, step by step."""
    from effattn.extending.report import ExtendReport
    from effattn.profiling.environment import environment
    from effattn.surgery.describing import describe
    from effattn.surgery.swapping import swap

    check(settings)
    model, tokenizer, plan, rule, window = load(settings, show)
    text = read(settings, show, tokenizer, window)
    quality: list[dict] = []
    tuned = None
    if settings.output is not None:
        if settings.tune_tokens:
            flow.check_unfinished(settings, begin=True)
        quality += measured(settings, show, "before", model, text, plan)
        swap(model, positions=rule["spec"])
        quality += measured(settings, show, "with the rule", model, text, plan)
        if settings.tune_tokens:
            tuned = fine_tune(settings, show, model, text, window)
            quality += measured(settings, show, "after tuning", model, text, plan)

    told = describe(model)
    report = ExtendReport(
        {
            "kind": "extend",
            "settings": asked_for(settings, model, text),
            "plan": plan.to_dict(),
            "rule": rule,
            "model": {
                "class": told.model,
                "dtype": told.dtype,
                "parameters": told.parameters["total"],
            },
            "quality": quality,
            "tuning": tuned,
            "verification": None,
            "environment": environment(),
        }
    )
    if main_process() and settings.output is not None:
        save(settings, show, report, model, tokenizer, plan)
        flow.discard(settings.partial)
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.extending.tuning import check_memory
    from effattn.outputs import check_new_folder
    from effattn.position_sampling import METHODS
    from effattn.training.lora import check_peft

    flow.device(settings.device)
    check_choice("sampling", settings.sampling, (*METHODS, WHOLE))
    if type(settings.to) is not int or settings.to < 1:
        raise ValueError(f"to: got {settings.to}, valid is a whole number of at least 1")
    if settings.lora and not settings.tune_tokens:
        raise ValueError(
            f"lora: got {settings.lora} without tune_tokens; valid is 0, or a budget to train on"
        )
    if settings.tune_tokens and settings.output is None:
        raise ValueError(
            "tune_tokens: given without output; name the folder for the tuned checkpoint"
        )
    if settings.memory is not None:
        check_memory(settings.memory, sampling_of(settings))
        if not settings.tune_tokens:
            raise ValueError(
                f"memory: got {settings.memory!r} without tune_tokens; valid is a budget to tune on"
            )
    if settings.lora:
        check_peft()
    if settings.output is not None:
        check_new_folder("output", settings.output)


def sampling_of(settings: Settings) -> str | None:
    """How `tune` is told of the sampling."""
    return None if settings.sampling == WHOLE else settings.sampling


def load(settings: Settings, show: Quiet) -> tuple:
    """The model on its device, its tokenizer, the plan, the rule as the report has it, and the
    tokens of a training window. What cannot be tuned is said here."""
    from effattn.extending import planner
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import check_room
    from effattn.surgery.attaching import require_own_attention
    from effattn.surgery.checkpoint import load_model
    from effattn.surgery.swapping import restore, swap
    from effattn.training import lending

    with show.stage("loading the model"):
        model, tokenizer = load_model(settings.model, bos=settings.bos)
        model.to(flow.device(settings.device))
        require_own_attention(model, settings.model)
        if settings.output is not None:
            check_room("output", settings.output, weight_bytes(model))
        plan = planner.make_plan(model, settings.to, tuned=bool(settings.tune_tokens))
        rule = chosen(settings, model, plan)
        window = training_window(settings, plan, **rule)
        # attention with a rule of its own, which may refuse what the model asks of it
        if settings.tune_tokens and (settings.memory or not rule["plain"]):
            own = {} if rule["plain"] else {"positions": rule["spec"]}
            swap(model, settings.memory, **own)
            try:
                lending.rehearse(model)
            finally:
                restore(model)
    return model, tokenizer, plan, rule, window


def chosen(settings: Settings, model, plan: Plan) -> dict[str, object]:
    """{"spec": what to apply, "plain": whether plain transformers computes it}. Raises what the
    rule's parts raise."""
    from effattn.hf import anatomy, positions
    from effattn.positions.registry import parse

    named = plan.candidate(settings.rule) if settings.rule else plan.recommended
    spec = settings.rule if named is None else named.spec
    parse(spec)
    order = positions.make(anatomy.of(model), spec)
    return {"spec": spec, "plain": spec == "rope" or order.config is not None}


def training_window(settings: Settings, plan: Plan, spec: str, plain: bool) -> int:
    """Tokens of a training window. ValueError for what cannot be trained so."""
    if settings.memory is not None and not plain:
        raise ValueError(
            f"memory: got {settings.memory!r} with {spec!r}, which counts positions by itself; "
            "valid is a rule that transformers has, such as yarn"
        )
    full = settings.sampling == WHOLE and settings.memory is None
    window = settings.window or (settings.to if full else plan.trained)
    if window > settings.to:
        raise ValueError(f"window: got {window}, valid is at most the target ({settings.to})")
    if settings.tune_tokens and not (plain or full):
        # None where the config has one set of parameters for layers with and without a window
        held = any(one.plain for one in plan.candidates if one.name != "rope")
        other = ", or a rule that transformers has, such as yarn" if held else ""
        raise ValueError(
            f"sampling: got {settings.sampling!r}, and {spec!r} counts positions by itself; valid "
            f"is 'none' (windows of the target length){other}"
        )
    return window


def read(settings: Settings, show: Quiet, tokenizer, window: int) -> Streams | None:
    """The text to tune and measure on; None where neither is asked for. ValueError for too little
    of it."""
    from effattn.textdata import streams

    if settings.output is None or not (settings.sequences or settings.tune_tokens):
        return None
    with show.stage("reading text"):
        text = streams(
            tokenizer,
            train=max(settings.tune_tokens, 2 * window),
            evaluation=settings.sequences * settings.to + 1,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )
    if settings.tune_tokens and len(text.train) < 2 * window:
        raise ValueError(
            f"text: it has {len(text.train):,} training tokens, windows of {window:,} need twice "
            "that"
        )
    return text


def measured(
    settings: Settings, show: Quiet, stage: str, model, text: Streams | None, plan: Plan
) -> list[dict]:
    """A row of the report's "quality": the same tokens in windows of the trained length and of the
    target. Empty where nothing is measured, or another process does it."""
    from effattn.evaluate.curve import scores, token_scores
    from effattn.extending.texts import windows

    if not main_process() or not settings.sequences:
        return []
    target = plan.target
    with show.stage(f"measuring {stage}") as progress:
        count, found = (len(text.evaluation) - 1) // target, []
        stretches = text.evaluation[: count * target + 1].unfold(0, target + 1, target)
        for length in (plan.trained, target):
            # whole windows: the trained length need not divide the target
            rows = windows(stretches[:, : target // length * length + 1], length)
            curve = token_scores(model, rows, progress=progress)
            found.append({"length": length, **scores(*curve)})
    return [{"stage": stage, "lengths": found}]


def fine_tune(settings: Settings, show: Quiet, model, text: Streams, window: int) -> dict:
    """Trains the model with its rule, from the last checkpoint of an unfinished run if there is
    one."""
    from effattn.extending.tuning import tune

    with show.stage(f"tuning on {settings.tune_tokens:,} tokens") as progress:
        return tune(
            model,
            text.train,
            target=settings.to,
            window=window,
            train_tokens=settings.tune_tokens,
            folder=settings.partial / "tuning",
            sampling=sampling_of(settings),
            memory=settings.memory,
            batch=settings.batch,
            lr=settings.lr,
            lora=settings.lora,
            seed=settings.seed,
            progress=progress,
            overrides={"use_cpu": model.device.type == "cpu"} | settings.overrides,
        )


def save(
    settings: Settings, show: Quiet, report: ExtendReport, model, tokenizer, plan: Plan
) -> None:
    """Writes the checkpoint, and proves that it gives the same logits when it is loaded again.
    RuntimeError otherwise."""
    import torch

    from effattn.surgery import checkpoint

    with flow.saving(settings, show, report) as folder:
        model.config.use_cache = True
        checkpoint.save(model, folder, tokenizer)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(min(256, plan.trained)) % vocabulary
        _, found = checkpoint.load_again(folder, model, ids)
        files = sorted(file.name for file in folder.iterdir())
        report.data["verification"] = found | {"files": ", ".join(files)}


def asked_for(settings: Settings, model, text: Streams | None) -> dict[str, object]:
    """What the report says of the settings, the model first."""
    asked = {"model": settings.model} | as_json(settings.told())
    told = {"source": None} if text is None else {"source": text.source} | flow.fed(text, model)
    return asked | told


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
