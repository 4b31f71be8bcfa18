"""Every conversion method at several numbers of KV heads, side by side, and the uptraining curves.

    python recipes/sweep_gqa.py --output runs/sweep --uptrain-tokens 600k

Writes sweep.json, sweep.html and one checkpoint for each number of heads, kv<N>, as
`recipes/convert_gqa.py` does. Run again to go on after a kill: conversions in sweep.json and
finished folders are not repeated. The documentation's tables and `results/` come from here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from effattn.outputs import check_writable, claim
from effattn.recipes import convert_gqa, flow, options
from effattn.recipes.console import console
from effattn.recipes.options import contexts, names, option, tokens, whole
from effattn.stages import Quiet

if TYPE_CHECKING:
    from effattn.heads.report import ConversionReport


@dataclass
class Settings(options.Settings):
    """Convert by every method, with and without the O re-fit, and uptrain `optimal` at each number
    of KV heads.
    """

    output: Path = option(help="folder for the results")
    model: str = options.model_name()
    kv_heads: Sequence[int] = contexts((4, 2, 1), "numbers of KV heads")
    methods: Sequence[str] = names(
        ("optimal", "aligned", "mean", "first", "random"), "conversion methods"
    )
    uptrain_tokens: int = tokens(0, "to distil `optimal` on; 0: none")
    evaluation_tokens: int = tokens(65_536, "held out, to measure on", least=2)
    calibration_tokens: int = whole(50_000, least=1)  # from Python alone
    length: int = whole(512, least=8, unit="tokens")


def run(settings: Settings, show: Quiet | None = None) -> list[ConversionReport]:
    """Converts, measures and writes; returns a report for each conversion."""
    check(settings)
    output, show = Path(settings.output), show or Quiet()
    check_writable("output", output)
    with claim("output", output):
        reports = without_training(settings, show)
        for count in settings.kv_heads if settings.uptrain_tokens else ():
            reports.append(uptrained(settings, count, show))
            write(output, reports)
        write(output, reports)
    return reports


def check(settings: Settings) -> None:
    """ValueError for what no conversion takes."""
    from effattn.errors import check_choice
    from effattn.heads.gqa import METHODS

    if not settings.kv_heads:
        raise ValueError("kv_heads: got none, valid is at least one number")
    if not settings.methods:
        raise ValueError("methods: got none, valid is at least one name")
    for method in settings.methods:
        check_choice("methods", method, METHODS)


def without_training(settings: Settings, show: Quiet) -> list[ConversionReport]:
    """Every method at every number of heads, with and without the re-fit."""
    from effattn.evaluate.loss import compare, measure_parent
    from effattn.heads.gqa import convert_gqa
    from effattn.surgery.checkpoint import load_model
    from effattn.textdata import streams

    output = Path(settings.output)
    reports = finished(output)
    done = {tuple(one.settings[key] for key in ("kv_heads", "method", "refit")) for one in reports}
    wanted = [
        (count, method, refit)
        for count in settings.kv_heads
        for method in settings.methods
        for refit in (True, False)
    ]
    parent, tokenizer = load_model(settings.model)
    text = streams(
        tokenizer, train=settings.calibration_tokens, evaluation=settings.evaluation_tokens
    )
    before = None
    for count, method, refit in wanted:
        if (count, method, refit) in done:
            continue
        said = f"{method}{' + refit' if refit else ''}, {count} KV heads"
        with show.stage(said) as progress:
            before = before or measure_parent(parent, text, settings.length)
            student = copy.deepcopy(parent)
            report = convert_gqa(
                student,
                count,
                text.train,
                method=method,
                refit=refit,
                length=settings.length,
                progress=progress,
            )
            converted = compare(parent, student, text.evaluation, settings.length)
        report.data["settings"] |= {
            "model": settings.model,
            "calibration_source": text.source,
        } | flow.fed(text, parent)
        report.data["quality"] = {**before, "converted": converted}
        reports.append(report)
        write(output, reports)
    return reports


def finished(output: Path) -> list[ConversionReport]:
    """The conversions without training that an earlier run has written."""
    from effattn.heads.report import ConversionReport

    if not (output / "sweep.json").exists():
        return []
    old = [ConversionReport(data) for data in json.loads((output / "sweep.json").read_text())]
    return [report for report in old if not report.settings["uptrain_tokens"]]


def uptrained(settings: Settings, count: int, show: Quiet) -> ConversionReport:
    """The whole conversion to `count` heads, distilled, in a folder of its own."""
    from effattn.heads.report import ConversionReport

    one = convert_gqa.Settings(
        model=settings.model,
        kv_heads=count,
        output=Path(settings.output) / f"kv{count}",
        calibration_tokens=settings.calibration_tokens,
        evaluation_tokens=settings.evaluation_tokens,
        uptrain_tokens=settings.uptrain_tokens,
        length=settings.length,
    )
    if (one.output / flow.REPORT).exists():
        flow.discard(one.partial)  # of a run that was killed at its very end
        return ConversionReport.load(one.output)
    return convert_gqa.run(one, show)


def write(output: Path, reports: Sequence[ConversionReport]) -> None:
    """The comparison, as a page and as JSON."""
    from effattn.heads.report_compare import compare_html
    from effattn.reports.files import write_text_atomic

    write_text_atomic(output / "sweep.html", compare_html(reports))
    found = json.dumps([report.data for report in reports], indent=1)
    write_text_atomic(output / "sweep.json", found + "\n")


def tell(settings: Settings, reports: Sequence[ConversionReport]) -> None:
    """The table on the terminal."""
    from rich.table import Table

    table = Table("KV heads", "method", "re-fit", "excess CE converted", "uptrained", "perplexity")
    for report in reports:
        stage = "uptrained" if report.quality.get("uptrained") else "converted"
        table.add_row(
            str(report.settings["kv_heads"]),
            report.settings["method"],
            "yes" if report.settings["refit"] else "no",
            f"{report.excess('converted'):+.4f}",
            f"{report.excess('uptrained'):+.4f}" if stage == "uptrained" else "",
            f"{report.measured(stage):.3f}",
        )
    console.print(table)
    page = (Path(settings.output) / "sweep.html").absolute()
    console.print(f"{page}", soft_wrap=True, highlight=False)


command = flow.command(Settings, run, tell)

if __name__ == "__main__":
    typer.run(command)
