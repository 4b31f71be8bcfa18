"""The whole job behind `recipes/prune_structured.py` and `effattn prune structured`.

Load, measure, prune, measure, compare criteria, time decoding, save, prove in a fresh process that
plain transformers loads the result, and only then give it its name."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effattn import embedded
from effattn.bounds import Bounds, Checked, random_seed, whole
from effattn.errors import check_choice
from effattn.evaluate.loss import compare, measure_parent
from effattn.hf import anatomy as hf
from effattn.hf.verify import verify_plain
from effattn.outputs import atomic_folder, check_new_folder
from effattn.profiling.decode import decode_speed
from effattn.prune.structural.criteria import CRITERIA
from effattn.prune.structural.criteria.base import TARGETS
from effattn.prune.structural.removal import plan_of, structured
from effattn.prune.structural.report import StructuredReport
from effattn.recipes.jobs import Quiet, device, holds_output
from effattn.surgery.checkpoint import load_model
from effattn.textdata import Streams, streams


@dataclass
class Job(Checked):
    """The settings of one run. heads, ffn, layers: an int is how many stay, a float the share that
    is removed; None: all stay. `criteria`: the first one is saved, the others are compared with it
    (each a name, or "heads=taylor, layers=block_influence")."""

    output: Path
    model: str = embedded.NAME
    heads: int | float | None = None
    ffn: int | float | None = None
    layers: int | float | None = None
    criteria: Sequence[str] = ("taylor",)
    compensate: bool = True
    bias: bool = False
    without: bool = True
    text: Sequence[Path] = ()
    dataset: str | None = None
    column: str | None = None
    calibration_tokens: int = whole(65_536, least=1)
    evaluation_tokens: int = whole(32_768, least=16)
    length: int | None = whole(None, least=8, unit="tokens")
    decode_contexts: Sequence[int] = whole((512, 4096), least=1)
    seed: int = random_seed()
    device: str = "auto"

    @property
    def amounts(self) -> dict[str, int | float | None]:
        """Target -> what was asked for."""
        return {target: getattr(self, target) for target in TARGETS}


@holds_output(StructuredReport)
def run(job: Job, show: Quiet | None = None) -> StructuredReport:
    """Runs `job`; returns the report, which also lies in the output folder as
    report.{json,md,html}.

    Raises ValueError (bad settings or input), Unsupported (a shape that the model's class cannot
    hold), FloatingPointError and OSError, each before anything appears under the output's name."""
    show = show or Quiet()
    named = check_job(job)
    with show.stage("loading the model"):
        model, tokenizer = load_model(job.model)
        model.to(device(job.device))
        for criterion in named:
            plan_of(hf.of(model), job.amounts, criterion)
    with show.stage("reading text"):
        data = streams(
            tokenizer,
            train=job.calibration_tokens,
            evaluation=job.evaluation_tokens,
            text=job.text,
            dataset=job.dataset,
            column=job.column,
        )
        calibration = data.train[: job.calibration_tokens]
    small, report, runs = None, None, []
    for place, criterion in enumerate(named):
        with show.stage(f"pruning by {_said(criterion)}") as progress:
            start = time.perf_counter()
            cut, found = structured(
                model,
                calibration,
                **job.amounts,
                criterion=criterion,
                compensate=job.compensate,
                bias=job.bias,
                length=job.length,
                seed=job.seed,
                progress=progress,
            )
            seconds = time.perf_counter() - start
        if place == 0:
            small, report = cut, found
            length = min(found.data["settings"]["length"], len(data.evaluation) - 1)
            with show.stage("measuring the whole model") as progress:
                quality = measure_parent(model, data, length, progress)
        row = _measured(
            model,
            cut,
            data,
            length,
            criterion,
            _compensation(job.compensate, job.bias),
            seconds,
            show,
        )
        runs.append(row)
        if place == 0:
            quality["pruned"] = {key: row[key] for key in ("perplexity", "cross_entropy", "kl")}
        if job.without and (job.compensate or job.bias):
            start = time.perf_counter()
            plain, _ = structured(
                model,
                calibration,
                **job.amounts,
                criterion=criterion,
                compensate=False,
                length=job.length,
                seed=job.seed,
            )
            seconds = time.perf_counter() - start
            runs.append(_measured(model, plain, data, length, criterion, "nothing", seconds, show))
    report.data["quality"] = quality
    report.data["runs"] = runs
    report.data["settings"] |= {"model": job.model, "source": data.source}
    if job.decode_contexts:
        with show.stage("timing decode steps") as progress:
            report.data["decode"] = _decode(model, small, job.decode_contexts, progress)
    with (
        show.stage("saving, and loading again without effattn"),
        atomic_folder(job.output) as folder,
    ):
        small.config.use_cache = True
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report.data["verification"] = verify_plain(
            folder, small, data.evaluation[: min(64, length)]
        )
        sizes = report.data["sizes"]
        sizes["after"]["file_bytes"] = sum(
            file.stat().st_size for file in folder.glob("*.safetensors")
        )
        overhead = sizes["after"]["file_bytes"] - sizes["after"]["weight_bytes"]
        sizes["before"]["file_bytes"] = _file_bytes(job.model) or sizes["before"][
            "weight_bytes"
        ] + max(0, overhead)
        report.save(folder)
    return report


def check_job(job: Job) -> list[str | dict[str, str]]:
    """Everything that can be known to be wrong before a model is loaded; returns the criteria,
    parsed. ValueError.
    """
    named = [parse_criterion(text) for text in job.criteria]
    if not named:
        raise ValueError(f"criterion: got none, valid are {', '.join(map(repr, CRITERIA))}")
    if all(amount is None for amount in job.amounts.values()):
        raise ValueError(
            "heads, ffn, layers: got none; valid is at least one of them: how many stay (4), or "
            "the share that is "
            "removed (0.25 or 25%)"
        )
    for name, amount in job.amounts.items():
        if isinstance(amount, float):
            Bounds(whole=False, least=0, most=1).check(name, amount)
        elif amount is not None:
            Bounds(whole=True, least=1).check(name, amount)
    device(job.device)
    check_new_folder("output", job.output)
    return named


def parse_criterion(text: str) -> str | dict[str, str]:
    """ "taylor", or "heads=taylor,layers=block_influence" as a dict. ValueError for unknown
    names.
    """
    if "=" not in text:
        return check_choice("criterion", text.strip(), CRITERIA)
    found = {}
    for part in text.split(","):
        target, _, name = (piece.strip() for piece in part.partition("="))
        found[check_choice("criterion", target, TARGETS)] = check_choice(
            "criterion", name, CRITERIA
        )
    return found


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


def _measured(
    model, cut, data: Streams, length: int, criterion, compensation: str, seconds: float, show
) -> dict:
    with show.stage(f"measuring {_said(criterion)}, solved again: {compensation}") as progress:
        found = compare(model, cut, data.evaluation, length, progress=progress)
    return {
        "criterion": _said(criterion),
        "compensation": compensation,
        "seconds": seconds,
        **found,
    }


def _compensation(compensate: bool, bias: bool) -> str:
    return {
        (True, False): "weights",
        (True, True): "weights and biases",
        (False, True): "biases",
    }.get((compensate, bias), "nothing")


def _said(criterion: str | dict[str, str]) -> str:
    return (
        criterion
        if isinstance(criterion, str)
        else ", ".join(f"{k}={v}" for k, v in criterion.items())
    )


def _file_bytes(name: str) -> int | None:
    """Bytes of the source's weight files; None where they are not in a folder here."""
    folder = embedded.directory() if name == embedded.NAME else Path(name)
    return (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
        if folder.is_dir()
        else None
    )


def _decode(model, small, contexts: Sequence[int], progress) -> list[dict]:
    rows: dict[int, dict] = {}
    for row in decode_speed({"before": model, "after": small}, list(contexts), progress=progress):
        rows.setdefault(row["context"], {"context": row["context"]})[row.pop("model")] = row
    return list(rows.values())
