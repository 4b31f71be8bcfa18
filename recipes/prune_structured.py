r"""Cut heads, FFN dimensions and layers out of a checkpoint; what comes out is a smaller plain
model.

    python recipes/prune_structured.py --model embedded --ffn 25% --output runs/narrow
    python recipes/prune_structured.py --heads 4 --ffn 528 \
        --criterion taylor --criterion random --output runs/small
    python recipes/prune_structured.py --layers 3 --criterion block_influence --output runs/shallow

A whole number is how many stay, a share is how much is removed. `--help` lists every option; the
same command is `effattn prune structured`. From Python:

    from effattn.recipes.prune_structured import Settings, run
    report = run(Settings(output=Path("runs/narrow"), ffn=0.25))

Score every structure by a criterion, cut the lowest ones, solve the output projections again for
what is left, and measure; the same by the other criteria, and without solving again, to compare.
The first one is saved: the output has its name only when a fresh process has shown that plain
transformers computes the same with it.

A model that does not fit into memory three times (or with `--measure no`) is pruned from file to
file, one decoder layer in memory at a time, by the first criterion, and not measured;
`.<output>.partial` beside the output keeps an unfinished run, with which the same command goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, layerwise, options
from effattn.recipes.options import option, several, tokens
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.prune.structural.report import StructuredReport
    from effattn.textdata import Streams

Criterion = str | dict[str, str]  # one, or one by target


def parse_amount(name: str, text: str | None) -> int | float | None:
    """ "4" (how many stay), "0.25" or "25%" (the share that is removed); None as it is. ValueError
    for other text.
    """
    if text is None or text.strip().lower() in ("", "none", "all"):
        return None
    try:
        value = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{name}: got {text!r}, valid is like 4 (how many stay), 0.25 or 25%"
        ) from None
    return value if text.endswith("%") or "." in text else int(value)


@dataclass
class Settings(options.Saving):
    """Cut whole heads, FFN dimensions and layers out: a smaller plain checkpoint, and what that
    cost and saved.
    """

    output: Path = option(help="new folder for the checkpoint and its report")
    model: str = options.model_name()
    # An int is how many stay, a float the share that is removed; None: all stay.
    heads: int | float | None = option(
        None,
        "heads (with GQA key/value heads, with their query heads): how many stay in each layer "
        "(4), or the share that is removed (0.5 or 50%)",
        read=parse_amount,
    )
    ffn: int | float | None = option(None, "FFN dimensions: the same", read=parse_amount)
    layers: int | float | None = option(None, "layers: the same", read=parse_amount)
    uneven: bool = option(
        False,
        "how many stay is meant on average: each layer keeps what is among the best of all layers; "
        "what comes out needs effattn to load",
        name="--uneven",
    )
    criteria: Sequence[str] = several(
        ("taylor",),
        "taylor (default), obs, michel, activation, flap, wanda_sum, block_influence or random, or "
        "by target: heads=flap,layers=block_influence; repeat to compare, the first one is saved",
        name="--criterion",
    )
    compensate: bool = option(True, "solve the output projections again by least squares")
    bias: bool = option(
        False,
        "give them biases where the class's config can (FLAP: with --no-compensate)",
        name="--bias",
    )
    without: bool = option(True, "measure it without solving again, too")
    text: Sequence[Path] = options.text_files("to calibrate on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = tokens(65_536, "to score and solve on", least=1)
    evaluation_tokens: int = tokens(32_768, "held out, to measure on", least=16)
    length: int | None = options.window_length()
    measure: str = layerwise.measure_option()
    decode_contexts: Sequence[int] = options.decode_contexts((512, 4096))
    seed: int = options.random_seed("the random criterion")
    device: str = options.device_name()

    COMMAND: ClassVar = "prune structured"
    APART: ClassVar = ("decode_contexts", "measure")

    @property
    def partial(self) -> Path:
        """The folder of an unfinished run from file to file."""
        return flow.partial_folder(self.output)

    @property
    def amounts(self) -> dict[str, int | float | None]:
        """Target -> what was asked for."""
        return {"heads": self.heads, "ffn": self.ffn, "layers": self.layers}

    @property
    def solved(self) -> str:
        """What is solved again, in words."""
        weights, biases = ["weights"] * self.compensate, ["biases"] * self.bias
        return " and ".join(weights + biases) or "nothing"

    def stopped(self) -> str:
        """What is kept: something from file to file alone."""
        kept = self.partial.is_dir()
        return super().stopped() if kept else "stopped; nothing was written"


def run(settings: Settings, show: Quiet | None = None) -> StructuredReport:
    """Prunes; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input), Unsupported (a shape that the model's class cannot
    hold), FloatingPointError, RuntimeError (the saved checkpoint is another model) and OSError
    (disk), each before anything appears under the output's name."""
    from effattn.prune.structural.report import StructuredReport

    with flow.output_of(settings, StructuredReport, show) as finished:
        if finished:
            return StructuredReport.load(settings.output)
        named = check(settings)
        if layerwise.fits(settings):
            return prune(settings, show or Quiet(), named)
        return prune_files(settings, show or Quiet(), named[0])


# The steps
# -------------------------------------------------------------------------------------------------


def prune(settings: Settings, show: Quiet, named: Sequence[Criterion]) -> StructuredReport:
    """The pruning of a model in memory, step by step. named: the criteria."""
    from effattn.evaluate.loss import measure_parent
    from effattn.profiling.decode import rows_by_context
    from effattn.reports.common import QUALITY_NAMES

    flow.check_unfinished(settings, begin=False)
    model, tokenizer = load(settings, show, named)
    text = read(settings, show, tokenizer)

    small, report, quality, length = None, None, {}, 0
    runs: list[dict] = []
    for criterion in named:
        with show.stage(f"pruning by {said(criterion)}") as progress:
            cut, found, seconds = pruned(settings, model, text, criterion, progress=progress)
        if report is None:  # the first one is what is saved
            small, report = cut, found
            length = min(found.data["settings"]["length"], len(text.evaluation) - 1)
            with show.stage("measuring the whole model") as progress:
                quality = measure_parent(model, text, length, progress)
        row = {"criterion": said(criterion), "compensation": settings.solved, "seconds": seconds}
        runs.append(measured(row, show, model, cut, text, length))
        if settings.without and settings.solved != "nothing":
            cut, _, seconds = pruned(settings, model, text, criterion, solve=False)
            row = row | {"compensation": "nothing", "seconds": seconds}
            runs.append(measured(row, show, model, cut, text, length))
    quality["pruned"] = {key: runs[0][key] for key in QUALITY_NAMES}
    report.data["quality"] = quality
    report.data["runs"] = runs
    report.data["settings"] |= {"model": settings.model, "source": text.source}
    report.data["settings"] |= flow.fed(text, model)

    if settings.decode_contexts:
        with show.stage("timing decode steps") as progress:
            models = {"before": model, "after": small}
            report.data["decode"] = rows_by_context(models, settings.decode_contexts, progress)
    with flow.saving(settings, show, report, plain=not settings.uneven) as folder:
        ids = text.evaluation[: min(64, length)]
        report.data["verification"] = save(settings, folder, small, tokenizer, ids)
        weigh(settings, folder, report.data["sizes"])
    return report


def prune_files(settings: Settings, show: Quiet, criterion: Criterion) -> StructuredReport:
    """The pruning by one criterion from file to file, where the model is not in memory; nothing is
    measured, and nothing compared."""
    from effattn.hf.source import folder_of
    from effattn.hf.weight_files import file_bytes
    from effattn.prune.structural.from_files import FACTS, report_in, structured_files

    if settings.uneven:
        raise ValueError(
            "uneven: got True with a model that is not in memory; from file to file every layer "
            "keeps as many"
        )

    def weighed(report: StructuredReport) -> StructuredReport:
        sizes = report.data["sizes"]
        sizes["before"]["file_bytes"] = file_bytes(folder_of(settings.model))
        sizes["after"]["file_bytes"] = file_bytes(settings.partial / "converted")
        return report

    def make(source: Path, folder: Path, tokens, **where) -> StructuredReport:
        how = {"criterion": criterion, "compensate": settings.compensate, "bias": settings.bias}
        how |= {name: getattr(settings, name) for name in ("length", "seed", "bos")}
        return weighed(structured_files(source, folder, tokens, **settings.amounts, **how, **where))

    said_of_it = f"pruning from file to file, layer by layer, by {said(criterion)}"
    again = lambda source, folder, tokens: weighed(report_in(folder))  # noqa: E731
    return layerwise.carry_out(settings, show, said_of_it, make, again, FACTS)


def check(settings: Settings) -> list[Criterion]:
    """Everything that can be known to be wrong before a model is loaded; returns the criteria.
    Raises ValueError."""
    from effattn.bounds import Bounds
    from effattn.outputs import check_new_folder
    from effattn.prune.structural.criteria import CRITERIA

    named = [parse_criterion(text) for text in settings.criteria]
    if not named:
        raise ValueError(f"criterion: got none, valid are {', '.join(map(repr, CRITERIA))}")
    if all(amount is None for amount in settings.amounts.values()):
        raise ValueError(
            "heads, ffn, layers: got none; valid is at least one of them: how many stay (4), or "
            "the share that is removed (0.25 or 25%)"
        )
    for name, amount in settings.amounts.items():
        if isinstance(amount, float):
            Bounds(whole=False, least=0, most=1).check(name, amount)
        elif amount is not None:
            Bounds(whole=True, least=1).check(name, amount)
    flow.device(settings.device)
    check_new_folder("output", settings.output)
    layerwise.check(settings)
    return named


def parse_criterion(text: str) -> Criterion:
    """ "taylor", or "heads=taylor,layers=block_influence" as a dict. ValueError for unknown
    names.
    """
    from effattn.errors import check_choice
    from effattn.prune.structural.criteria import CRITERIA
    from effattn.prune.structural.criteria.base import TARGETS

    if "=" not in text:
        return check_choice("criterion", text.strip(), CRITERIA)
    found = {}
    for part in text.split(","):
        target, _, name = (piece.strip() for piece in part.partition("="))
        target = check_choice("criterion", target, TARGETS)
        found[target] = check_choice("criterion", name, CRITERIA)
    return found


def said(criterion: Criterion) -> str:
    """A criterion in words."""
    if isinstance(criterion, str):
        return criterion
    return ", ".join(f"{target}={name}" for target, name in criterion.items())


def load(settings: Settings, show: Quiet, named: Sequence[Criterion]) -> tuple:
    """The model on its device, and its tokenizer. A shape or criterion that is not for this model
    is refused."""
    from effattn.hf import anatomy
    from effattn.prune.structural.plan import plan_of
    from effattn.surgery.checkpoint import load_model

    with show.stage("loading the model"):
        model, tokenizer = load_model(settings.model, bos=settings.bos)
        model.to(flow.device(settings.device))
        for criterion in named:
            plan_of(anatomy.of(model), settings.amounts, criterion, not settings.uneven)
    return model, tokenizer


def read(settings: Settings, show: Quiet, tokenizer) -> Streams:
    """The text to calibrate and measure on."""
    from effattn.textdata import streams

    with show.stage("reading text"):
        return streams(
            tokenizer,
            train=settings.calibration_tokens,
            evaluation=settings.evaluation_tokens,
            text=settings.text,
            dataset=settings.dataset,
            column=settings.column,
            evaluation_text=settings.evaluation_text,
        )


def pruned(
    settings: Settings,
    model,
    text: Streams,
    criterion: Criterion,
    solve: bool = True,
    progress=None,
) -> tuple:
    """A smaller model, what the library reports of it, and the seconds it took. solve: as asked
    for; False: what is left stays as it is."""
    from effattn.prune.structural.removal import structured

    start = time.perf_counter()
    cut, found = structured(
        model,
        text.train[: settings.calibration_tokens],
        **settings.amounts,
        criterion=criterion,
        compensate=settings.compensate and solve,
        bias=settings.bias and solve,
        uniform=not settings.uneven,
        length=settings.length,
        seed=settings.seed,
        progress=progress,
    )
    return cut, found, time.perf_counter() - start


def measured(row: dict, show: Quiet, model, cut, text: Streams, length: int) -> dict:
    """A row of the comparison, with its quality."""
    from effattn.evaluate.loss import compare

    what = f"measuring {row['criterion']}, solved again: {row['compensation']}"
    with show.stage(what) as progress:
        return row | compare(model, cut, text.evaluation, length, progress=progress)


def save(settings: Settings, folder: Path, small, tokenizer, ids) -> dict:
    """Writes the checkpoint, and proves that it gives the same logits when it is loaded again: by
    transformers alone in a fresh process, or where layers differ by effattn. RuntimeError
    otherwise."""
    from effattn.surgery import checkpoint

    if not settings.uneven:
        return flow.save_plain(folder, small, tokenizer, ids)
    small.config.use_cache = True
    checkpoint.save(small, folder, tokenizer)
    return checkpoint.load_again(folder, small, ids)[1]


def weigh(settings: Settings, folder: Path, sizes: dict) -> None:
    """Bytes of the weight files. Where the source's are not in a folder here: those of its weights,
    and as much beside them as the new file has."""
    from effattn.hf.source import resolve
    from effattn.hf.weight_files import file_bytes

    before, after = sizes["before"], sizes["after"]
    after["file_bytes"] = file_bytes(folder)
    overhead = max(0, after["file_bytes"] - after["weight_bytes"])
    before["file_bytes"] = file_bytes(resolve(settings.model)) or before["weight_bytes"] + overhead


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
