r"""Long Range Arena, drawn from seeds: every bidirectional pattern in a small encoder.

    python recipes/lra.py --output runs/lra
    python recipes/lra.py --tasks listops --length 1024 --steps 5000 --output runs/listops

`--help` lists every option. From Python:

    from effattn.recipes.lra import Settings, run
    report = run(Settings(output=Path("runs/lra")))

ListOps and pathfinder are drawn from seeds; an encoder with each pattern is trained on each from
scratch, and with three of them once more after it has learned to restore masked tokens of the same
inputs. The report has accuracy against time and memory. Killed, the same command goes on with the
next row. `OMP_NUM_THREADS=1` keeps the times comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import names, option, real, several, whole
from effattn.resuming import Parts, what_is_kept
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.arena.report import ArenaReport


@dataclass
class Settings(options.Settings):
    """Train a small encoder with every bidirectional pattern on ListOps and pathfinder: accuracy
    against time and memory.
    """

    output: Path = option(help="new folder for the report")
    tasks: Sequence[str] = names(("listops", "pathfinder_images"), "tasks")
    patterns: Sequence[str] = several(
        (),
        "a spec; repeat for more (default: every bidirectional pattern, an eighth wide)",
        name="--pattern",
    )
    pretrained: Sequence[str] = names(
        ("dense", "linear", "performer"), "patterns to pretrain once more, by name"
    )
    length: int = whole(256, "tokens of an input, at most", least=32, unit="tokens")
    width: int = whole(64, "numbers a token", least=8)
    layers: int = whole(2, "of the encoder", least=1)
    heads: int = whole(4, "of a layer", least=1)
    examples: int = whole(4000, "to train on", least=1)
    tested: int = whole(1000, "held out", least=1)
    steps: int = whole(1000, "of training a row", least=1)
    pretrain_steps: int = whole(1000, "of restoring masked inputs before", least=1)
    batch: int = whole(32, "examples a step", least=1)
    lr: float = real(1e-3, "peak learning rate", above=0)
    seed: int = options.random_seed("examples, weights and order")

    @property
    def partial(self) -> Path:
        """The file of finished rows, beside the output."""
        return flow.partial_file(self.output)

    def stopped(self) -> str:
        """How many rows are kept, and where."""
        return what_is_kept(self.partial)


def run(settings: Settings, show: Quiet | None = None) -> ArenaReport:
    """Trains and measures; returns the report, which also lies in the output folder as
    report.{json,md,html}. Raises ValueError (bad settings), FloatingPointError (a loss that is no
    number) and OSError (disk), each before anything appears under the output's name."""
    from effattn.arena.report import ArenaReport

    with flow.output_of(settings) as finished:
        if finished:
            return ArenaReport.load(settings.output)
        return rows(settings, show or Quiet())


def rows(settings: Settings, show: Quiet) -> ArenaReport:
    """Row by row."""

    from effattn.arena.report import KIND, ArenaReport
    from effattn.arena.tasks import TASKS
    from effattn.arena.training import train
    from effattn.outputs import atomic_folder
    from effattn.profiling.environment import environment
    from effattn.resuming import as_json

    wanted = check(settings)
    here = environment()
    made_with = {name: here[name] for name in ("torch", "device", "threads")}
    kept = Parts(settings.partial, settings.kept(), made_with, "lra")
    jobs, facts = {}, {}
    for task, pattern, before in wanted:
        name = f"{task}, {pattern}" + (", pretrained" if before else "")
        jobs[name] = partial(train, TASKS[task], pattern, budget(settings, before))
        facts[name] = {"task": task, "pattern": pattern, "pretraining": before}
    made = flow.parts(show, kept, f"training {len(jobs)} encoders", jobs)
    data = {
        "kind": KIND,
        "settings": as_json(settings.kept()),
        "model": {name: getattr(settings, name) for name in ("width", "layers", "heads")},
        "rows": [told | row for told, row in zip(facts.values(), made, strict=True)],
        "environment": here,
    }
    report = ArenaReport(data)
    with atomic_folder(settings.output) as folder:
        report.save(folder)
    kept.discard()
    return report


def budget(settings: Settings, pretraining: int):
    """What every row has alike."""
    from dataclasses import fields

    from effattn.arena.training import Budget

    alike = {one.name for one in fields(Budget)} - {"pretraining"}
    given = {name: getattr(settings, name) for name in alike}
    return Budget(pretraining=pretraining, **given)


def check(settings: Settings) -> list[tuple[str, str, int]]:
    """(task, pattern, steps before) of every row. ValueError for what means nothing."""
    from effattn.arena.tasks import TASKS
    from effattn.arena.widths import eighths
    from effattn.errors import check_choice
    from effattn.registry import backend
    from effattn.specs import parse_spec

    if not settings.tasks:
        raise ValueError("tasks: got none, valid is at least one name")
    for task in settings.tasks:
        check_choice("tasks", task, TASKS)
        if settings.length < (least := TASKS[task].least):
            raise ValueError(f"length: got {settings.length}, {task} takes at least {least} tokens")
    if settings.width % settings.heads or settings.width // settings.heads % 2:
        raise ValueError(
            f"heads: got {settings.heads} for a width of {settings.width}, valid are heads of an "
            "even size"
        )
    patterns = list(dict.fromkeys(settings.patterns)) or eighths(settings.length)
    for spec in patterns:
        if not backend(spec).traits.bidirectional:
            raise ValueError(f"patterns: got {spec!r}, which is causal only")
    known = {parse_spec(spec)[0]: spec for spec in patterns}
    for name in settings.pretrained if not settings.patterns else ():
        check_choice("pretrained", name, known)
    before = [spec for name, spec in known.items() if name in settings.pretrained]
    return [
        (task, spec, steps)
        for task in settings.tasks
        for steps, some in ((0, patterns), (settings.pretrain_steps, before))
        for spec in some
    ]


def tell(settings: Settings, report: ArenaReport) -> None:
    """The report's tables, and where it lies: there is no checkpoint."""
    flow.console_of(settings.WIDTH).print(report)
    flow.tell_report(settings.output)


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
