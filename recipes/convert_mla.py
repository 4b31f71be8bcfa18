r"""Give a checkpoint multi-head latent attention, in the form that servers know.

    python recipes/convert_mla.py --model embedded --rank 96 --rope-dim 32 --output runs/mla

`--help` lists every option; the same command is `effattn convert-mla`. From Python:

    from effattn.recipes.convert_mla import Settings, run
    report = run(Settings(model="embedded", rank=96, rope_dim=32, output=Path("runs/mla")))

Measure the parent, move positions into few shared dimensions and the rest into a latent, measure,
time decoding, and save: the output, of transformers' DeepSeek-V3 class, has its name only when a
fresh process has shown that plain transformers computes the same with it.
`.<output>.partial` beside it holds what an unfinished run has measured; the same command goes on
from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import converting, flow, options
from effattn.recipes.options import option, whole
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    from effattn.heads.mla.report import MlaReport


@dataclass
class Settings(options.Saving):
    """Give a checkpoint multi-head latent attention: plain, of the DeepSeek-V3 class."""

    rank: int = whole(help="numbers a token of the latent, one of them a constant", least=2)
    output: Path = option(help="new folder for the checkpoint and its report")
    rope_dim: int | None = whole(
        None, "dimensions that keep their position, shared by all heads; a head's own", least=2
    )
    model: str = options.model_name()
    refit: bool = converting.refits()
    text: Sequence[Path] = converting.text_files()
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_text: Sequence[Path] = options.evaluation_files()
    bos: bool | None = options.begins_with_bos()
    calibration_tokens: int = converting.calibration_tokens()
    evaluation_tokens: int = converting.evaluation_tokens()
    length: int = converting.window_length()
    device: str = options.device_name()
    decode_contexts: Sequence[int] = converting.decode_contexts()

    COMMAND: ClassVar = "convert-mla"
    APART: ClassVar = ("decode_contexts",)

    @property
    def partial(self) -> Path:
        return flow.partial_folder(self.output)


def run(settings: Settings, show: Quiet | None = None) -> MlaReport:
    """Converts; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input), FloatingPointError, RuntimeError (the saved
    checkpoint is another model) and OSError (disk), each before anything appears under the
    output's name."""
    from effattn.heads.mla.report import MlaReport

    with flow.output_of(settings, MlaReport, show) as finished:
        if finished:
            return MlaReport.load(settings.output)
        return convert(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def convert(settings: Settings, show: Quiet) -> MlaReport:
    """The conversion, step by step."""
    from effattn.heads.mla.convert import check_mla, convert_mla

    converting.check(settings)
    parent, tokenizer, parts = converting.load(
        settings, show, lambda parts: check_mla(parts, settings.rank, settings.rope_dim)
    )
    going = converting.begin(settings, show, parent, tokenizer, parts, "convert-mla")

    # Shared keys, and the best latent of the rest, layer by layer, in a new model.
    with show.stage("converting to multi-head latent attention") as progress:
        student, report = convert_mla(
            parent,
            going.calibration,
            rank=settings.rank,
            rope_dim=settings.rope_dim,
            refit=settings.refit,
            length=going.length,
            progress=progress,
        )
    converting.measure(going, student, report)

    if main_process():
        with flow.saving(settings, show, report, plain=True) as folder:
            ids = going.text.evaluation[: min(64, going.length)]
            report.data["verification"] = flow.save_plain(folder, student, tokenizer, ids)
        flow.discard(settings.partial)
    return report


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
