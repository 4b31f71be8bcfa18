r"""Give a checkpoint latent keys and values: r numbers a token are remembered, of which both come.

    python recipes/convert_latent.py --model embedded --ratio 0.25 --output runs/latent
    python recipes/convert_latent.py --model M --bytes 16384 --uptrain-tokens 50M --output DIR

`--help` lists every option; the same command is `effattn convert-latent`. From Python:

    from effattn.recipes.convert_latent import Settings, run
    report = run(Settings(model="embedded", ratio=0.25, output=Path("runs/latent")))

Measure the parent, find each layer's best latents on some text, measure, distil on demand
(uptraining), measure, time decoding, and save: the output has its name only when what was saved
gives the same logits. `effattn.load` reads it. `.<output>.partial` beside it holds what an
unfinished run has measured; the same command goes on from there. A model that does not fit into
memory is converted from file to file, one layer in memory, and not measured (`--measure`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import converting, flow, layerwise, options
from effattn.recipes.options import option, real, whole
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.heads.latent.report import LatentReport


@dataclass
class Settings(options.Saving):
    """Give a checkpoint latent keys and values: a smaller cache, loaded by effattn."""

    output: Path = option(help="new folder for the checkpoint and its report")
    rank: int | None = whole(None, "numbers a token, in every layer", least=1)
    bytes: int | None = whole(None, "bytes a token, in all layers together", least=1)
    ratio: float | None = real(None, "share of the bytes that the cache takes now", above=0)
    energy: float | None = real(None, "share of the weighed energy that layers keep", above=0)
    model: str = options.model_name()
    refit: bool = converting.refits()
    text: Sequence[Path] = converting.text_files()
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = converting.calibration_tokens()
    evaluation_tokens: int = converting.evaluation_tokens()
    uptrain_tokens: int = converting.uptrain_tokens()
    length: int = converting.window_length()
    batch: int = converting.uptrain_batch()
    lr: float | None = real(None, "peak learning rate (default: by width, 3e-3 at 256)", above=0)
    ce_weight: float = converting.ce_weight()
    layer_weight: float = converting.layer_weight()
    trainable: str = converting.trainable()
    seed: int = options.random_seed("data order")
    device: str = options.device_name()
    decode_contexts: Sequence[int] = converting.decode_contexts()
    measure: str = layerwise.measure_option()
    overrides: dict = field(default_factory=dict)  # for TrainingArguments, from Python alone

    COMMAND: ClassVar = "convert-latent"
    APART: ClassVar = ("decode_contexts", "measure")

    @property
    def partial(self) -> Path:
        return flow.partial_folder(self.output)

    @property
    def size(self) -> dict:
        """How large latents are to be, as `convert_latent` takes it."""
        return {name: getattr(self, name) for name in ("rank", "bytes", "ratio", "energy")}


def run(settings: Settings, show: Quiet | None = None) -> LatentReport:
    """Converts; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, RuntimeError (the saved
    checkpoint is another model) and OSError (disk), each before anything appears under the
    output's name."""
    from effattn.heads.latent.report import LatentReport

    with flow.output_of(settings, LatentReport, show) as finished:
        if finished:
            return LatentReport.load(settings.output)
        check(settings)
        if layerwise.fits(settings, "uptrain_tokens"):
            return convert(settings, show or Quiet())
        named = (*settings.size, "refit", "length")
        heads = layerwise.spec("latent", settings, *named)
        return layerwise.convert(settings, show or Quiet(), heads)


# The steps
# -------------------------------------------------------------------------------------------------


def convert(settings: Settings, show: Quiet) -> LatentReport:
    """The conversion, step by step."""
    from effattn.heads.latent.convert import check_latent
    from effattn.surgery.checkpoint import load_again, save
    from effattn.surgery.latents import convert_latent

    parent, tokenizer, parts = converting.load(
        settings, show, lambda parts: check_latent(parts, **settings.size)
    )
    going = converting.begin(settings, show, parent, tokenizer, parts, "convert-latent")

    # The best latents of each layer in closed form, of ranks that together are as asked.
    student = copy.deepcopy(parent)
    with show.stage("converting to latent keys and values") as progress:
        report = convert_latent(
            student,
            going.calibration,
            **settings.size,
            refit=settings.refit,
            length=going.length,
            progress=progress,
        )
    # The parent teaches what the conversion has lost, if that was asked for.
    converting.measure(going, student, report)

    if main_process():
        with flow.saving(settings, show, report) as folder:
            student.config.use_cache = True
            save(student, folder, tokenizer)
            ids = going.text.evaluation[: min(64, going.length)]
            _, report.data["verification"] = load_again(folder, student, ids)
        flow.discard(settings.partial)
    return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before a model is loaded. Raises ValueError."""
    from effattn.heads.latent.ranks import Size

    Size(**settings.size).check_given()
    layerwise.check(settings, "uptrain_tokens")
    converting.check(settings)


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
