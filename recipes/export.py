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

from collections.abc import Callable, Sequence
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


def _layers(name: str, text: str | None) -> tuple[int, ...]:
    """Numbers of layers, with commas between them."""
    try:
        return tuple(int(one) for one in (text or "").split(",") if one.strip())
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, valid is like 0,1") from None


@dataclass
class Settings(options.Settings):
    """Write a checkpoint for another engine (llama.cpp, OpenVINO, plain transformers, vLLM), and
    check it there.
    """

    to: str = option(help="gguf (llama.cpp), openvino, transformers (without effattn) or vllm")
    output: Path = option(help="new folder for the export and its report; or a new .gguf file")
    model: str = options.model_name()
    format: str | None = option(
        None, "of a GGUF file: f16 (default), q8_0, bf16 or f32; of OpenVINO: f16 or f32"
    )
    check: bool = option(
        False,
        "run it there (transformers: in a fresh process) and compare with ours",
        name="--check",
    )
    before: str | None = option(
        None, "the checkpoint that this one was made of, whose speed is measured beside it"
    )
    kv_cache: str | None = option(
        None, "for vLLM: fp8, with scales of keys and values that a text is read for"
    )
    kv_skip: Sequence[int] = option(
        (),
        "layers that are cached as they are: 0,1",
        read=_layers,
    )
    text: Sequence[Path] = options.text_files("to measure these scales on", "more")

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
            kv_cache=settings.kv_cache,
            kv_skip=settings.kv_skip,
            calibration=_text(settings),
            progress=progress,
        )


def _text(settings: Settings) -> Callable | None:
    """tokenizer -> tokens of the text files, as many as scales take; None where there are none.
    Raises what is wrong with them at once."""
    if not settings.text:
        return None
    if settings.kv_cache is None:
        raise ValueError("text: it is of kv_cache, which was not asked for")
    from effattn.exporting.kv_scales import TOKENS
    from effattn.textdata import from_files, read_files

    read_files(settings.text)

    def tokens(tokenizer):
        import torch

        return torch.cat(from_files(settings.text, tokenizer, TOKENS)[0])[:TOKENS]

    return tokens


def tell(settings: Settings, report: ExportReport) -> None:
    """What the command prints: the report's tables, and where things lie."""
    flow.console_of(settings.WIDTH).print(report)
    flow.console.print(f"\nexport      {settings.output}", soft_wrap=True, highlight=False)
    if settings.output.is_dir():
        flow.tell_report(settings.output)


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
