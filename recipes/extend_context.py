r"""Position rules side by side beyond a model's trained length: the table of the ReRoPE article, on
any checkpoint.

    python recipes/extend_context.py --output runs/positions
    python recipes/extend_context.py --rules rerope,yarn --sequences 4 \
        --lengths 512,4k --output runs/few
    python recipes/extend_context.py --rules baseline --tune-tokens 300k \
        --lengths 512,2k --output runs/tuned

`--help` lists every option. From Python:

    from effattn.recipes.extend_context import Settings, run
    report = run(Settings(rules=("rerope", "yarn"), output=Path("runs/few")))

To choose a rule for a checkpoint and write it: `effattn extend`.

Each rule reads the same tokens in windows of every length, so that a longer window differs in
nothing but what it can see; the same text repeated, so that copying from far back pays; and prompts
whose answer lies far back. With `--tune-tokens` the rules that are made for fine-tuning are tuned
to each longer length, and their losses stand against the tokens tuned on. Every finished part is
kept in `.<output>.partial.json` beside the output, and an unfinished tuning's checkpoints in
`.<output>.partial`: the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.evaluate import DEPTHS
from effattn.outputs import check_file, claim_all, sweep
from effattn.recipes import flow, options, tuned_rules
from effattn.recipes.console import console, console_of
from effattn.recipes.options import (
    contexts,
    contexts_of,
    names,
    option,
    real,
    several,
    tokens,
    whole,
)
from effattn.resuming import Parts, as_json, partial_file, what_is_kept
from effattn.stages import Quiet

if TYPE_CHECKING:
    from torch import Tensor

    from effattn.extending.article_report import ArticleReport

AUTO, NONE = "auto", "none"  # of retrieval, beside the tasks' names


@dataclass
class Settings(options.Settings):
    """Position rules side by side beyond the trained length: loss, copying and retrieval from far
    back.
    """

    model: str = options.model_name()
    rules: Sequence[str] = names(
        (),
        'names from the table, or what comes before their dash, such as "rerope,yarn,ntk-mixed"; '
        "the baseline is always there",
    )
    logn: bool = option(
        True,
        "each position rule a second time, with test-time log-n, if the model was not trained with "
        "it",
    )
    lengths: Sequence[int] | None = contexts(
        None,
        "windows (default: 1, 4 and 8 times the trained length)",
        unit="tokens",
        read=lambda name, text: tuple(contexts_of(text, name)) or None,
    )
    sequences: int = whole(8, "stretches of the longest length", least=1)
    period: int | None = whole(
        None,
        "tokens after which repeated text repeats (default: one and a half trained lengths)",
        least=1,
    )
    retrieval: str = option(AUTO, "recall, passkey, auto (what the model does best) or none")
    retrieval_length: int | None = whole(
        None, "tokens of a prompt (default: the middle one of the lengths)", least=1
    )
    retrieval_trials: int = whole(4, "prompts a depth", least=1)
    retrieval_depths: Sequence[float] = real(DEPTHS, least=0, most=1)  # from Python alone
    retrieval_style: str | None = option(
        None, "of the passkey: text, or code (default: code for the embedded model)"
    )
    tune_tokens: int = tokens(0, "to fine-tune each rule of --tune-rules on; 0: none")
    tune_rules: Sequence[str] = names(
        (), "of none, pi, ntk, yarn, abf: those to tune, to each longer length (default: all)"
    )
    tune_lr: float | None = real(None, "constant learning rate (default: by width)", above=0)
    tune_text: Sequence[Path] = several((), "UTF-8 text to tune on, apart from what is measured on")
    reach: Sequence[int] = contexts(
        (2, 4, 8),
        "with --tune-tokens: trained lengths that the scaling law promises bases for, which are "
        "tuned at the trained length and measured; or none",
        least=2,
    )
    text: Sequence[Path] = several((), "UTF-8 documents to measure on; repeat for more")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    bos: bool | None = options.begins_with_bos()
    output: Path | None = option(None, "folder for report.{html,md,json}; a killed run resumes")
    json: Path | None = option(None, "file for the results alone; a killed run resumes")
    seed: int = options.random_seed("the prompts")
    device: str = options.device_name()

    # a rule's part is the same beside others
    APART: ClassVar = ("json", "rules", "logn", "tune_rules", "reach")
    WIDTH: ClassVar = 160

    @property
    def partial(self) -> Path | None:
        """None when nothing is written at all."""
        target = self.output or self.json
        return None if target is None else partial_file(target)

    @property
    def training(self) -> Path | None:
        """Where an unfinished tuning keeps its checkpoints."""
        target = self.output or self.json
        return None if target is None else flow.partial_folder(target)

    def stopped(self) -> str:
        """How many finished parts are kept, and where."""
        return what_is_kept(self.partial)


def run(settings: Settings, show: Quiet | None = None) -> ArticleReport:
    """Measures; returns the report, which with an output also lies there as report.{json,md,html}.

    Raises ValueError (bad settings or input) and OSError (disk), each before anything is measured.
    """
    check(settings)
    with claim_all({"output": settings.output, "json": settings.json}):
        return side_by_side(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def side_by_side(settings: Settings, show: Quiet) -> ArticleReport:
    """All of it, what is written being held."""
    from effattn.extending import copying
    from effattn.extending.article_report import ArticleReport
    from effattn.extending.rule_losses import measured
    from effattn.hf.beginning import bos_of
    from effattn.profiling.environment import environment
    from effattn.reports.files import numbers

    model, tokenizer, trained, lengths, rules, own = load(settings, show)
    sequences, source = read(settings, show, tokenizer, lengths)
    tuning = tuned_rules.read(settings, show, tokenizer)
    period = settings.period or 3 * trained // 2
    resolved = as_json(settings.kept() | {"lengths": lengths, "period": period})
    made_with = flow.made_with(model, "device", "torch", "transformers")
    kept = Parts(settings.partial, resolved, made_with, "extend-context")

    # What the model has not learned within its trained length, no rule can show beyond it.
    said, copies = "has the model learned to copy?", copying.copy_check
    copy = flow.part(show, kept, said, "copy", copies, model, sequences, trained)
    asking = retrieval_prompts(settings, tokenizer)
    within = tasks_within(settings, show, kept, model, trained, asking)
    task, learned = copying.best_task(within) if within else (None, False)

    at, trials = settings.retrieval_length or lengths[len(lengths) // 2], settings.retrieval_trials
    rows = []
    for number, rule in enumerate(rules, 1):
        said, name = f"{rule.name} ({number} of {len(rules)})", rule.name
        given = (rule, model, sequences, lengths, period, trained)
        row = flow.part(show, kept, f"texts: {said}", f"texts/{name}", measured, *given)
        answers = None
        if task is not None and not rule.logn:
            how = {"length": at, "trials": trials} | asking
            stage, name = f"{task}: {said}", f"{task}/{name}"
            with rule.on(model):
                answers = flow.part(show, kept, stage, name, copying.ask, task, model, **how)
        rows.append(row | {"retrieval": answers})
    tuned = None
    if tuning is not None:
        longest = lengths[0] * 2 * max(settings.reach, default=1)
        far, _ = read(settings, show, tokenizer, [longest])
        tuned = tuned_rules.tune(settings, show, kept, model, tuning, sequences, lengths, far)

    prompts = {
        "source": source,
        "bos": bos_of(model) is not None,
        "retrieval_length": at,
        "style": asking["style"],
    }
    data = {
        "kind": "extend_context",
        "settings": resolved | prompts,
        "model": model_facts(model, trained) | {"own": own},
        "copy": copy,
        "task": task,
        "task_learned": learned,
        "within": within,
        "rules": rows,
        "tuned": tuned,
        "environment": environment(),
    }
    report = ArticleReport(numbers(data))
    if settings.output is not None:
        report.save(settings.output)
    if settings.json is not None:
        report.save_json(settings.json)
    if settings.training is not None:
        flow.discard(settings.training)
    kept.discard()
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.errors import check_choice
    from effattn.evaluate.passkey_retrieval import STYLES
    from effattn.extending.copying import TASKS
    from effattn.textdata import check_source

    flow.device(settings.device)
    check_choice("retrieval", settings.retrieval, (*TASKS, AUTO, NONE))
    if settings.retrieval_style is not None:
        check_choice("retrieval_style", settings.retrieval_style, STYLES)
    check_source(settings.text, settings.dataset)
    tuned_rules.check(settings)
    written = settings.output and Path(settings.output) / flow.REPORT
    for argument, file in (("output", written), ("json", settings.json)):
        if file is not None:
            check_file(argument, file)
    if written is not None and written.exists() and not settings.partial.exists():
        sweep(settings.output)  # the run that wrote it may have been killed at its very end
        raise ValueError(f"output: {settings.output} holds a finished report; give a new folder")


def load(settings: Settings, show: Quiet) -> tuple:
    """The model on its device, its tokenizer, the tokens that it was trained with, the lengths of
    windows, the rules, and what `trained_with` gives. What the model cannot have is said before
    anything is measured."""
    from effattn.extending.rules import chosen, of_own, rules, trained_with
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        model, tokenizer = load_model(settings.model, bos=settings.bos)
        model.to(flow.device(settings.device))
        trained = trained_length(model)
        own = trained_with(model, settings.model)
        lengths = check_lengths(settings, trained)
        every = rules(trained, lengths[-1])
        if own:
            tuned_rules.check_own(settings)
            wanted = of_own(every, settings.rules, own, attending(model))
        else:
            wanted = chosen(every, settings.rules, settings.logn)
        for rule in wanted:
            with rule.on(model):
                pass
    return model, tokenizer, trained, lengths, wanted, own


def trained_length(model) -> int:
    """The tokens that the model was trained with. Unsupported for models without plain rotary
    positions.
    """
    from effattn.errors import Unsupported
    from effattn.hf import anatomy

    parts = anatomy.of(model)
    if not parts.causal or not any(layer.rotary_dims for layer in parts.layers):
        raise Unsupported(
            f"model: {type(model).__name__} has no rotary positions to change; valid is a causal "
            "model with them, such as 'embedded'"
        )
    return int(parts.trained_length)


def attending(model) -> int:
    """How many layers attend."""
    from effattn.hf import anatomy

    return sum(layer.attends for layer in anatomy.of(model))


def check_lengths(settings: Settings, trained: int) -> list[int]:
    """The lengths of the windows, ascending. ValueError for those that cannot be compared."""
    lengths = sorted(set(settings.lengths or (trained, 4 * trained, 8 * trained)))
    longest = lengths[-1]
    for length in lengths:
        if length < 16 or longest % length:
            raise ValueError(
                f"lengths: got {length}, valid is 16 or more tokens, and what divides the longest "
                f"({longest}), so that the same tokens are read at every length"
            )
    if trained not in lengths or longest == trained:
        raise ValueError(
            f"lengths: got {lengths}, valid are the trained length ({trained}) and longer ones"
        )
    period = settings.period or 3 * trained // 2
    if period >= longest:
        raise ValueError(f"period: got {period}, valid is less than the longest length ({longest})")
    return lengths


def read(settings: Settings, show: Quiet, tokenizer, lengths: Sequence[int]) -> tuple[Tensor, str]:
    """The sequences, int64 (count, longest + 1), and where they come from."""
    from effattn.extending import texts
    from effattn.textdata import held_out

    with show.stage("reading text"):
        found, source = held_out(settings.text, settings.dataset, settings.column)
        return texts.long_sequences(found, tokenizer, settings.sequences, lengths[-1]), source


def retrieval_prompts(settings: Settings, tokenizer) -> dict:
    """What all questions have in common, as `copying.ask` takes it."""
    from effattn import embedded

    style = "code" if str(settings.model) == embedded.NAME else "text"
    return {
        "tokenizer": tokenizer,
        "depths": settings.retrieval_depths,
        "style": settings.retrieval_style or style,
        "seed": settings.seed,
    }


def tasks_within(
    settings: Settings, show: Quiet, kept: Parts, model, trained: int, asking: dict
) -> dict[str, dict]:
    """What the model finds within its trained length, by task: those that it may be asked later."""
    from effattn.extending.copying import TASKS, ask

    tasks = TASKS if settings.retrieval == AUTO else (settings.retrieval,)
    how = {"length": 3 * trained // 4, "trials": 2 * settings.retrieval_trials} | asking
    return {
        task: flow.part(
            show, kept, f"{task} within {trained} tokens", f"within/{task}", ask, task, model, **how
        )
        for task in (tasks if settings.retrieval != NONE else ())
    }


def model_facts(model, trained: int) -> dict:
    """What the report says of the model."""
    from effattn.surgery.describing import describe

    told = describe(model)
    return {
        "class": told.model,
        "dtype": told.dtype,
        "device": str(model.device),
        "layers": len(told.layers),
        "parameters": told.parameters["total"],
        "trained_length": trained,
    }


def tell(settings: Settings, report: ArticleReport) -> None:
    """The report's tables, and where things lie."""
    console_of(settings.WIDTH).print(report)
    if settings.output is not None:
        flow.tell_report(settings.output, before="\n")
    if settings.json is not None:
        console.print(f"\nresults     {settings.json.absolute()}", soft_wrap=True, highlight=False)


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
