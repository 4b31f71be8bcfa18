r"""Make a checkpoint one of another class, which can hold fewer key/value heads: the same logits.

    python recipes/rehost.py --model EleutherAI/pythia-410m --output runs/pythia-as-phi

`--help` lists every option; the same command is `effattn rehost`. From Python:

    from effattn.recipes.rehost import Settings, run
    report = run(Settings(model="EleutherAI/pythia-410m", output=Path("runs/pythia-as-phi")))

Rearrange the weights, compare the logits of both on some text, and save: the output has its name
only when a fresh process has shown that plain transformers computes the same with it. Then every
conversion of heads takes it (`effattn convert-gqa --model runs/pythia-as-phi ...`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import typer

from effattn.recipes import flow, options
from effattn.recipes.options import option, tokens, whole
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.rehosting.report import RehostReport


@dataclass
class Settings(options.Saving):
    """Make a checkpoint one of a class that can hold fewer key/value heads: GPT-NeoX (Pythia) and
    GPT-J become Phi, OPT and GPT-2 GPTBigCode, with the same logits.
    """

    output: Path = option(help="new folder for the checkpoint and its report")
    model: str = options.model_name()
    text: Sequence[Path] = options.text_files("to compare logits on")
    dataset: str | None = options.dataset_name()
    column: str | None = options.text_column()
    evaluation_tokens: int = tokens(4096, "held out, to compare logits on", least=2)
    length: int = whole(512, "window length in tokens", least=2, unit="tokens")
    device: str = options.device_name()

    COMMAND: ClassVar = "rehost"

    def stopped(self) -> str:
        """That nothing is kept."""
        return "stopped; nothing was written"


def run(settings: Settings, show: Quiet | None = None) -> RehostReport:
    """Re-hosts; returns the report, which also lies in the output folder as report.{json,md,html}.

    Raises ValueError (bad settings or input), Unsupported (a model that has no other class),
    RuntimeError (other logits) and OSError (disk), each before anything appears under the output's
    name."""
    from effattn.rehosting.report import RehostReport

    with flow.output_of(settings, RehostReport, show) as finished:
        if finished:
            return RehostReport.load(settings.output)
        return rehost(settings, show or Quiet())


# The steps
# -------------------------------------------------------------------------------------------------


def rehost(settings: Settings, show: Quiet) -> RehostReport:
    """The re-hosting, step by step."""
    from effattn.hf.weights import weight_bytes
    from effattn.outputs import check_room
    from effattn.rehosting.rehosted import compared, host_of
    from effattn.rehosting.rehosted import rehost as rehosted
    from effattn.rehosting.report import RehostReport
    from effattn.surgery.checkpoint import load_model
    from effattn.textdata import measured_on

    place = flow.device(settings.device)
    with show.stage("loading the model"):
        old, tokenizer = load_model(settings.model)
        old.to(place)
        host_of(old)  # says what cannot be
        check_room("output", settings.output, weight_bytes(old))
    with show.stage("reading text"):
        wanted = settings.evaluation_tokens
        text, source = measured_on(
            tokenizer, wanted, settings.text, settings.dataset, settings.column
        )
        ids = text[:wanted]

    with show.stage("rearranging the weights") as progress:
        new = rehosted(old, progress)
    with show.stage("comparing logits") as progress:
        found = compared(old, new, ids, settings.length, progress)
    asked = {"model": settings.model, "source": source, "evaluation_tokens": len(ids)}
    report = RehostReport.of(old, new, asked | {"length": settings.length}, found)
    with flow.saving(settings, show, report, plain=True) as folder:
        kept = ids[: min(64, settings.length)]
        report.data["verification"] = flow.save_plain(folder, new, tokenizer, kept)
    return report


command = flow.command(Settings, run)

if __name__ == "__main__":
    typer.run(command)
