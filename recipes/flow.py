"""What every recipe is made of: one run at a time on an output, stages that are shown, what an
unfinished run goes on from, a checkpoint that is proven before it is there, and the command.

A recipe is a file with three things, and nothing else shared to know of:

    @dataclass
    class Settings(options.Saving):         # declared once, see recipes/options.py
        ...

    def run(settings, show=None):           # what Python calls
        with output_of(settings, Report, show) as finished:
            return Report.load(settings.output) if finished else steps(settings, show or Quiet())

    command = flow.command(Settings, run)   # what the command line calls: recipes/cli.py mounts it

Its steps import what they take from the library where they take it, so that `--help` does not wait
for torch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import check_choice
from effattn.outputs import atomic_folder, check_new_folder, claim
from effattn.recipes import publishing
from effattn.recipes.console import (
    Show,
    console,
    console_of,
    one_line_errors,
    quiet_libraries,
    when_stopped,
)
from effattn.recipes.options import Saving, Settings, parameters
from effattn.resuming import (
    Parts,
    as_json,
    check_settings,
    discard,
    is_of,
    partial_file,
    partial_folder,
)
from effattn.stages import Quiet, main_process

if TYPE_CHECKING:
    import torch

    from effattn.reports.document import Document

__all__ = [
    "REPORT",
    "Quiet",
    "check_unfinished",
    "command",
    "device",
    "discard",
    "fed",
    "made_with",
    "main_process",
    "output_of",
    "part",
    "partial_file",
    "partial_folder",
    "parts",
    "save_plain",
    "saving",
    "tell",
    "tell_hub",
    "tell_report",
]

Progress = Callable[[int, int], None]
REPORT = "report.json"  # written last: with it an output is complete


# Before the work
# -------------------------------------------------------------------------------------------------


def device(name: str) -> torch.device:
    """ "auto" is this process's own GPU if there is one, else the CPU. Raises ValueError for other
    names and for "cuda" without one."""
    import torch

    check_choice("device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: got 'cuda', torch sees no GPU here; valid are 'auto', 'cpu'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def output_of(
    settings: Settings,
    report: type[Document] | None = None,
    show: Quiet | None = None,
    default: str | None = None,
) -> Iterator[bool]:
    """Holds the new folder `settings.output` while the body runs: no other run works on it, and
    what cannot be written is said before anything else. Without an output, `default` is what the
    run goes by. Only the main process holds it. report, show: of a recipe that saves a checkpoint,
    the class of its report, and the stages.

    Yields whether the output is there already: from a run of these settings that was stopped or
    killed after its output was complete, and before lm-evaluation-harness was through, or what it
    went on from was removed; that is done now. Raises what `check_new_folder` and `claim` do."""
    if isinstance(settings, Saving):
        publishing.check(settings)
    output, named = settings.output, settings.output or default
    if not main_process() or named is None:
        yield False
    elif output is None:
        with claim("output", default):
            yield False
    else:
        if not _complete(output):
            check_new_folder("output", output)
        with claim("output", output):
            finished = _finished(settings)
            if not finished:
                check_new_folder("output", output)
            else:
                if isinstance(settings, Saving) and report is not None:
                    publishing.judge(settings, show or Quiet(), report.load(output), device)
                    publishing.push(settings, show or Quiet())
                if settings.partial is not None:  # last: where sending fails, it is done again
                    discard(settings.partial)
            yield finished


def _complete(output: Path | str) -> bool:
    return os.path.isfile(os.path.join(output, REPORT))


def _finished(settings: Settings) -> bool:
    partial = settings.partial
    if not _complete(settings.output):
        return False
    if isinstance(settings, Saving) and publishing.waits(settings):
        return True
    if partial is None:
        return False
    if partial.is_dir() and not any(partial.iterdir()):  # all but the last step of `discard`
        partial.rmdir()
    return is_of(partial, as_json(settings.kept()))


def check_unfinished(settings: Settings, begin: bool) -> None:
    """ValueError when `settings.partial` holds an unfinished run with other settings. begin: this
    one may leave something there from now on; the main process writes whose it is."""
    check_settings(settings.partial, as_json(settings.kept()), begin and main_process())


# The work
# -------------------------------------------------------------------------------------------------


def made_with(model, *names: str) -> dict:
    """What else must be the same for parts of two runs to stand in one report: the kind of device,
    and those names of the environment."""
    from effattn.profiling.environment import environment

    here = environment()
    return {"on": model.device.type} | {name: here[name] for name in names}


def part(show: Quiet, kept: Parts, stage: str, name: str, make: Callable, *given, **options) -> Any:
    """What `kept` has under that name, else what make(*given, progress=..., **options) gives, while
    `stage` is shown."""
    with show.stage(stage) as progress:
        return kept.once(name, lambda: make(*given, progress=progress, **options))


def parts(
    show: Quiet, kept: Parts, stage: str, jobs: Mapping[str, Callable[[Progress], Any]]
) -> list:
    """`part` for each of `jobs`, which take about as long: their names, and what makes them with a
    progress. They are one stage, whose progress is of all that are not there yet."""
    waiting = [name for name in jobs if name not in kept.done]
    found = []
    with show.stage(stage) as progress:
        for name, make in jobs.items():
            before = waiting.index(name) if name in waiting else 0

            def inside(done: int, total: int, before: int = before) -> None:
                progress(before * total + done, len(waiting) * total)

            found.append(kept.once(name, partial(make, inside)))
    return found


def fed(text, model) -> dict[str, object]:
    """What a report says of what was read, beside where the text to calibrate on comes from: where
    that to measure on does, and whether windows begin with the model's BOS. text: `Streams`, or the
    like."""
    from effattn.hf.beginning import bos_of

    return {"evaluation_source": text.evaluation_source, "bos": bos_of(model) is not None}


# The end
# -------------------------------------------------------------------------------------------------


@contextmanager
def saving(settings: Saving, show: Quiet, report: Document, plain: bool = False) -> Iterator[Path]:
    """Yields the folder that becomes the output when the body is through: what fails in it, the
    proof among it, leaves nothing. After the body come the model card and, last, the report. When
    the output has its name, lm-evaluation-harness judges it, and it is sent to the hub. plain: what
    is saved needs nothing of effattn, and the stage says so."""
    said = "saving, and loading again" + (" without effattn" if plain else "")
    with atomic_folder(settings.output) as folder:
        with show.stage(said):
            yield folder
        publishing.finish(settings, folder, report)
        report.save(folder)
    publishing.judge(settings, show, report, device)
    publishing.push(settings, show)


def save_plain(folder: Path, model, tokenizer, ids: torch.Tensor) -> dict:
    """Writes the checkpoint as transformers does, and proves in a fresh process that it needs
    nothing of effattn: the facts of `effattn.hf.verify.verify_plain`, which raises RuntimeError
    when it is another model there. ids: (T,) int64 to compare logits on."""
    from effattn.hf import verify

    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return verify.verify_plain(folder, model, ids)


# The command
# -------------------------------------------------------------------------------------------------


def tell(settings: Settings, report) -> None:
    """What a command prints when it has finished: the report's tables, and where things lie."""
    console_of(settings.WIDTH).print(report)
    if settings.output is not None:
        console.print(f"\ncheckpoint  {settings.output}", soft_wrap=True, highlight=False)
        tell_report(settings.output)
    tell_hub(settings)


def tell_report(output: Path, before: str = "") -> None:
    """Says where the report is."""
    page = (Path(output) / "report.html").absolute()
    console.print(f"{before}report      {page}", soft_wrap=True, highlight=False)


def tell_hub(settings: Settings) -> None:
    """Says where the output was sent."""
    if getattr(settings, "push_to_hub", None):
        console.print(f"hub         {settings.push_to_hub}", soft_wrap=True, highlight=False)


def command(settings: type[Settings], run: Callable, tell: Callable = tell) -> Callable:
    """The function that typer makes a command of: its options are the fields of `settings`, its
    help is the docstring of that class; it calls run(settings, show) and prints tell(settings,
    report), the main process alone."""

    @one_line_errors
    def called(**given) -> None:
        quiet_libraries()
        chosen, main = settings.from_options(given), main_process()
        with when_stopped(chosen.stopped):
            report = run(chosen, Show() if main else Quiet())
        if main:
            tell(chosen, report)

    # paragraphs as one line each: a terminal has a width of its own
    said = inspect.cleandoc(settings.__doc__ or "").split("\n\n")
    called.__doc__ = "\n\n".join(" ".join(part.split()) for part in said)
    called.__signature__ = inspect.Signature(parameters(settings))
    called.__annotations__ = {}
    return called
