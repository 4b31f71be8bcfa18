"""The job behind `effattn measure` and `recipes/measure.py`: check, load, measure, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effattn import embedded
from effattn.bounds import Checked, random_seed, real, whole
from effattn.errors import check_choice
from effattn.measuring import progress as saving
from effattn.measuring.job import BATCHES, CONTEXTS, SECONDS, STEPS, check_numbers, measure
from effattn.measuring.report import Report
from effattn.measuring.variants import parse_all
from effattn.outputs import check_file, check_writable, claim_all
from effattn.recipes.jobs import Quiet, device
from effattn.surgery.checkpoint import DTYPES, load_model

BESIDE = ("sliding(window=512, sinks=4)",)  # what a bare run shows beside the plain embedded model


@dataclass
class Job(Checked):
    """The settings of one run. `pattern` and `cache` are one variant together; `variants` are more
    of them.
    """

    model: str = embedded.NAME
    pattern: str | None = None
    cache: str | None = None
    variants: Sequence[str] = ()
    contexts: Sequence[int] = whole(CONTEXTS, least=1)
    batches: Sequence[int] = whole(BATCHES, least=1)
    steps: int = whole(STEPS, least=1)
    seconds: float = real(SECONDS, above=0)
    seed: int = random_seed()
    device: str = "auto"
    dtype: str = "auto"
    output: Path | None = None
    html: Path | None = None
    markdown: Path | None = None
    json: Path | None = None
    fresh: bool = False

    @property
    def files(self) -> dict[str, Path]:
        """Method of the report -> the file that it writes."""
        asked = {"to_json": self.json, "to_markdown": self.markdown, "to_html": self.html}
        return {method: file for method, file in asked.items() if file is not None}

    @property
    def partial(self) -> Path | None:
        """Where finished cells are kept while it runs; None when nothing is written at all."""
        if self.output is not None:
            return saving.partial_in(self.output)
        return next(map(saving.partial_beside, self.files.values()), None)

    @property
    def wanted(self) -> list[str] | None:
        """The variants as `measure` takes them."""
        axes = {"pattern": self.pattern, "cache": self.cache}
        together = "; ".join(f"{axis}={spec}" for axis, spec in axes.items() if spec is not None)
        asked = [*([together] if together else []), *self.variants]
        if not asked and str(self.model) == embedded.NAME:
            return list(BESIDE)
        return asked or None


def run(job: Job, show: Quiet | None = None) -> Report:
    """Runs `job`; what can be known to be wrong is said before the model is loaded. Raises what
    `measure` raises.
    """
    show = show or Quiet()
    parse_all(job.wanted)
    check_numbers(job.contexts, job.batches, job.steps, job.seconds)
    check_choice("dtype", job.dtype, DTYPES)
    place = device(job.device)
    if job.output is not None:
        saving.check_output(job.output, job.fresh)
    for method, file in job.files.items():
        check_writable(method.removeprefix("to_"), file.absolute().parent)
        check_file(method.removeprefix("to_"), file)
    with claim_all(
        {"output": job.output, "json": job.json, "markdown": job.markdown, "html": job.html}
    ):
        with show.stage("loading the model"):
            model, _ = load_model(job.model, job.dtype)
            model.to(place)
        report = measure(
            model,
            job.wanted,
            job.contexts,
            job.batches,
            steps=job.steps,
            seconds=job.seconds,
            seed=job.seed,
            output=job.output,
            resume=job.partial,
            fresh=job.fresh,
            name=str(job.model),
            show=show,
        )
        for method, file in job.files.items():
            getattr(report, method)(file)
        saving.discard(job.partial)
    return report


def what_is_kept(job: Job) -> str:
    """One line for who stops a run."""
    cells, total = saving.kept_cells(job.partial), len(set(job.contexts)) * len(set(job.batches))
    if job.partial is None:
        return (
            "stopped; nothing is kept: with --output DIR or --json FILE, what is finished would be"
        )
    if not cells:
        return "stopped before the first context was finished; nothing is kept"
    return (
        f"stopped; {cells} of {total} pairs of context and batch are kept in {job.partial}: the "
        "same command goes on "
        "from there"
    )
