r"""What a checkpoint costs to run: time to first token, time per token, memory and bandwidth,
variants side by side.

    python recipes/measure.py --contexts 1k,4k,16k --html measure.html
    python recipes/measure.py --model M --variant "window=sliding(window=1024)" \
        --variant "gqa=heads=gqa(kv_heads=2)"

`--help` lists every option; the same command is `effattn measure`, and `effattn compare` compares
two results. From Python, on a model that is loaded already: `effattn.measure`.

Every pair of context and batch is a cell, whose variants take turns, so that what else the machine
does falls on all of them. Finished cells are kept beside the result until that is written; the same
command goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from effattn.measuring import BATCHES, CONTEXTS, SECONDS, STEPS
from effattn.recipes import flow, options
from effattn.recipes.console import console, console_of
from effattn.recipes.options import option, real, several, whole
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.measuring.report import Report

BESIDE = ("sliding(window=512, sinks=4)",)  # what a bare run shows beside the plain embedded model


@dataclass
class Settings(options.Settings):
    """Measure time to first token, time per token, memory and bandwidth, variants side by side."""

    model: str = options.model_name()
    pattern: str | None = option(None, "a spec, or JSON from layers to specs, to compare")
    cache: str | None = option(None, "a cache format; with --pattern, one variant together")
    variants: Sequence[str] = several(
        (),
        "name=spec, repeated: a backend, plain, or axes such as 'heads=gqa(kv_heads=2); "
        "pattern=dense'",
        name="--variant",
    )
    contexts: Sequence[int] = options.contexts(CONTEXTS, "tokens of the prompt")
    batches: Sequence[int] = options.contexts(BATCHES, "sequences at once")
    steps: int = whole(STEPS, "decode steps to time, at most", least=1)
    seconds: float = real(
        SECONDS, "about so long for the prefills, and the steps, of a context", above=0
    )
    device: str = options.device_name()
    dtype: str = option("auto", "auto, float32, bfloat16, float16 or float64")
    seed: int = options.random_seed("the random tokens")
    output: Path | None = option(None, "folder for report.{html,md,json}; a killed run resumes")
    html: Path | None = option(None, "file for the page")
    markdown: Path | None = option(None, "file for the tables")
    json: Path | None = option(None, "file for the results, for `compare`")
    fresh: bool = option(False, "forget an unfinished run, replace a finished one")

    WIDTH = 180

    @property
    def files(self) -> dict[str, Path]:
        """The files asked for beside the folder: option -> path."""
        asked = {"json": self.json, "markdown": self.markdown, "html": self.html}
        return {name: Path(file) for name, file in asked.items() if file is not None}

    @property
    def partial(self) -> Path | None:
        """The file of finished cells; None when nothing is written at all."""
        from effattn.measuring.progress import partial_in

        if self.output is not None:
            return partial_in(Path(self.output))
        return next(map(flow.partial_file, self.files.values()), None)

    @property
    def wanted(self) -> list[str] | None:
        """The variants as `effattn.measure` takes them: --pattern and --cache are one together."""
        axes = {"pattern": self.pattern, "cache": self.cache}
        together = "; ".join(f"{axis}={spec}" for axis, spec in axes.items() if spec is not None)
        asked = [*([together] if together else []), *self.variants]
        if not asked and str(self.model) == "embedded":
            return list(BESIDE)
        return asked or None

    def stopped(self) -> str:
        from effattn.resuming import kept_parts

        if self.partial is None:
            return (
                "stopped; nothing is kept: with --output DIR or --json FILE, what is finished "
                "would be"
            )
        cells, total = kept_parts(self.partial), len(set(self.contexts)) * len(set(self.batches))
        if not cells:
            return "stopped before the first context was finished; nothing is kept"
        return (
            f"stopped; {cells} of {total} pairs of context and batch are kept in {self.partial}: "
            "the same command goes on from there"
        )


def run(settings: Settings, show: Quiet | None = None) -> Report:
    """Measures; returns the report, which also lies in the folder and files that were asked for.

    Raises what `effattn.measure` raises: ValueError, Unsupported and OSError, all before anything
    is measured."""
    from effattn.measuring.measurement import measure
    from effattn.outputs import claim_all
    from effattn.surgery.checkpoint import load_model

    show = show or Quiet()
    check(settings)
    with claim_all({"output": settings.output} | settings.files):
        with show.stage("loading the model"):
            model, _ = load_model(settings.model, settings.dtype)
            model.to(flow.device(settings.device))
        report = measure(
            model,
            settings.wanted,
            settings.contexts,
            settings.batches,
            steps=settings.steps,
            seconds=settings.seconds,
            seed=settings.seed,
            output=settings.output,
            resume=settings.partial,
            fresh=settings.fresh,
            name=str(settings.model),
            show=show,
        )
        for name, file in settings.files.items():
            getattr(report, f"to_{name}")(file)
        if settings.partial is not None:
            flow.discard(settings.partial)
        return report


def check(settings: Settings) -> None:
    """Everything that can be known to be wrong before the model is loaded. Raises ValueError, and
    OSError for what cannot be written."""
    from effattn.errors import check_choice
    from effattn.hf.source import DTYPES
    from effattn.measuring.measurement import check_numbers
    from effattn.measuring.progress import check_output
    from effattn.measuring.variants import parse_all
    from effattn.outputs import check_file, check_writable

    parse_all(settings.wanted)
    check_numbers(settings.contexts, settings.batches, settings.steps, settings.seconds)
    check_choice("dtype", settings.dtype, DTYPES)
    flow.device(settings.device)
    if settings.output is not None:
        check_output(Path(settings.output), settings.fresh)
    for name, file in settings.files.items():
        check_writable(name, file.absolute().parent)
        check_file(name, file)


def tell(settings: Settings, report: Report) -> None:
    """The tables, where the pages lie, and one line of JSON for programs."""
    console_of(settings.WIDTH).print(report)
    folder = settings.output and Path(settings.output) / "report.html"
    for file in filter(None, (folder, settings.html)):
        console.print(f"\nreport      {file.absolute()}", soft_wrap=True, highlight=False)
    print(report.summary())


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
