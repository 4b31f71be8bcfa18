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

from effattn.recipes import extend_tuning, flow, options
from effattn.recipes.extend_tuning import fine_tune, training_pattern, training_window
from effattn.recipes.options import contexts_of, option, real, tokens, whole
from effattn.resuming import Parts, as_json
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.extending.planner import Plan
    from effattn.extending.report import ExtendReport
    from effattn.textdata import Streams


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
        'a rule such as "yarn(length=4096)", "rerope(window=192)+logn" or "longrope(length=4096, '
        'search=40)", or a name from the plan (default: the recommended one)',
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
    train_pattern: str | None = option(
        None,
        'an exact pattern to tune with, such as "s2(block=1024)", LongLoRA\'s; the checkpoint has '
        "the model's own attention (with --sampling none)",
    )
    window: int | None = whole(
        None,
        "tokens of a training window (default: the trained length; without sampling the target)",
        least=8,
    )
    lora: int = whole(
        0, "rank of LoRA adapters to tune instead (needs peft); 0: all weights", least=0
    )
    lora_plus: bool = option(
        False, "with --lora, train the norms and embeddings, too", name="--lora-plus"
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

    with flow.output_of(settings, ExtendReport, show) as finished:
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
            tuned = fine_tune(settings, show, model, text, window, plan, rule)
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
    from effattn.extending import longrope
    from effattn.outputs import check_new_folder

    flow.device(settings.device)
    extend_tuning.check(settings)
    if type(settings.to) is not int or settings.to < 1:
        raise ValueError(f"to: got {settings.to}, valid is a whole number of at least 1")
    if settings.output is None and longrope.candidates_of(settings.rule):
        raise ValueError("rule: longrope(search=...) without output, where what it tried is kept")
    if settings.output is not None:
        check_new_folder("output", settings.output)


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
        window = training_window(settings, plan, rule["spec"], rule["plain"])
        # attention with a rule or a pattern of its own, which refuses dropout, say
        own = settings.memory or training_pattern(settings, plan)
        if settings.tune_tokens and not (rule["plain"] and own is None):
            rules = {} if settings.memory else {"positions": rule["spec"]}
            swap(model, own, **rules)
            try:
                lending.rehearse(model)
            finally:
                restore(model)
    if (found := search(settings, show, model, tokenizer)) is not None:
        rule |= {"spec": found["spec"], "search": found}
    return model, tokenizer, plan, rule, window


def search(settings: Settings, show: Quiet, model, tokenizer) -> dict | None:
    """The factors of longrope(search=...), from where an unfinished run stopped; None for other
    rules."""
    from effattn import embedded
    from effattn.extending import longrope

    if not longrope.candidates_of(settings.rule):
        return None
    flow.check_unfinished(settings, begin=True)
    file = settings.partial / "search.json" if main_process() else None
    made_with = flow.made_with(model, "device", "torch", "transformers")
    kept = Parts(file, as_json(settings.kept()), made_with, "extend")
    how = {"style": "code" if str(settings.model) == embedded.NAME else "text"}
    with show.stage("searching the factors of longrope") as progress:
        return longrope.find(
            model,
            tokenizer,
            settings.rule,
            settings.to,
            seed=settings.seed,
            once=kept.once,
            progress=progress,
            **how,
        )


def chosen(settings: Settings, model, plan: Plan) -> dict:
    """{"spec": what to apply, "plain": whether plain transformers computes it}; of what is searched
    for, where that begins. Raises what the rule's parts raise."""
    from effattn.extending import longrope
    from effattn.hf import anatomy, positions
    from effattn.positions.registry import parse

    named = plan.candidate(settings.rule) if settings.rule else plan.recommended
    spec = settings.rule if named is None else named.spec
    if longrope.candidates_of(spec):
        spec = longrope.first_spec(model, spec, settings.to)
    parse(spec)
    order = positions.make(anatomy.of(model), spec)
    return {"spec": spec, "plain": spec == "rope" or order.config is not None}


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
