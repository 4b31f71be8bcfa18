r"""Write a checkpoint for another engine, and have that engine prove that it computes the same.

    python recipes/export.py --model runs/gqa2 --to gguf --check --output runs/gqa2-gguf
    python recipes/export.py --model runs/gqa2 --to gguf --format q8_0 --check --before embedded \
        --output runs/gqa2-q8

`--help` lists every option; the same command is `effattn export`. From Python:

    report = effattn.export("runs/gqa2", to="gguf", output="runs/gqa2-gguf", check=True)

Load, refuse what the engine cannot express, write, run it there on demand, and only then give the
output its name. The report says how far logits and greedy tokens are from ours, what lies on the
disk, tokens a second, and what else runs where.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import option
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.exporting.report import ExportReport


@dataclass
class Settings(options.Settings):
    """Write a checkpoint for another engine (llama.cpp, plain transformers, vLLM), and check it
    there.
    """

    to: str = option(help="gguf (llama.cpp), transformers (without effattn) or vllm")
    output: Path = option(help="new folder for the export and its report; or a new .gguf file")
    model: str = options.model_name()
    format: str | None = option(None, "of a GGUF file: f16 (default), q8_0, bf16 or f32")
    check: bool = option(
        False,
        "run it there (llama.cpp; a fresh process with transformers) and compare with ours",
        name="--check",
    )
    before: str | None = option(
        None, "the checkpoint that this one was made of, whose speed is measured beside it"
    )

    def stopped(self) -> str:
        """That nothing is kept."""
        return "stopped; nothing was written"


def run(settings: Settings, show: Quiet | None = None) -> ExportReport:
    """Exports; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises what `effattn.export` does, each before anything appears under the output's name."""
    from effattn.exporting.export import GGUF, export

    one_file = settings.output.suffix == GGUF.suffix
    held = nullcontext() if one_file else flow.output_of(settings)
    with held, (show or Quiet()).stage("exporting") as progress:
        return export(
            settings.model,
            settings.to,
            settings.output,
            format=settings.format,
            check=settings.check,
            before=settings.before,
            progress=progress,
        )


def tell(settings: Settings, report: ExportReport) -> None:
    """What the command prints: the report's tables, and where things lie."""
    flow.console_of(settings.WIDTH).print(report)
    flow.console.print(f"\nexport      {settings.output}", soft_wrap=True, highlight=False)
    if settings.output.is_dir():
        flow.tell_report(settings.output)


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
