"""Many conversions of one model, measured alike: every method without training, and uptraining
curves.

What the README's table and `results/` come from; `recipes/sweep_gqa.py` runs it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from effattn.errors import check_choice
from effattn.evaluate.loss import compare
from effattn.heads import gqa, job
from effattn.heads.report import ConversionReport
from effattn.heads.report_compare import compare_html
from effattn.outputs import check_writable, claim
from effattn.recipes.jobs import discard
from effattn.reports.files import write_text_atomic
from effattn.surgery.checkpoint import load_model
from effattn.textdata import streams


def sweep(
    model: str,
    output: Path,
    *,
    kv_heads: Sequence[int],
    methods: Sequence[str],
    uptrain_tokens: int,
    calibration_tokens: int = 50_000,
    evaluation_tokens: int = 65_536,
    length: int = 512,
    show: job.Quiet | None = None,
) -> list[ConversionReport]:
    """Converts `model` by every method, with and without the O re-fit, then uptrains `optimal` at
    each number of KV heads. Writes output/{sweep.json, sweep.html} and, for each uptrained model, a
    folder kv<N> as convert-gqa does. Conversions already in output/sweep.json and finished folders
    are not repeated."""
    check_numbers(kv_heads, methods, uptrain_tokens, calibration_tokens, evaluation_tokens, length)
    output = Path(output)
    check_writable("output", output)
    with claim("output", output):
        return _sweep(
            model,
            output,
            kv_heads,
            methods,
            uptrain_tokens,
            calibration_tokens,
            evaluation_tokens,
            length,
            show or job.Quiet(),
        )


def check_numbers(
    kv_heads,
    methods,
    uptrain_tokens: int,
    calibration_tokens: int,
    evaluation_tokens: int,
    length: int,
) -> None:
    """ValueError for what no conversion takes."""
    if not kv_heads:
        raise ValueError("kv_heads: got none, valid is at least one number")
    for count in kv_heads:
        job.Job(
            "",
            count,
            Path(),
            uptrain_tokens=uptrain_tokens,
            calibration_tokens=calibration_tokens,
            evaluation_tokens=evaluation_tokens,
            length=length,
        )
    for method in methods:
        check_choice("methods", method, gqa.METHODS)


def _sweep(
    model,
    output,
    kv_heads,
    methods,
    uptrain_tokens,
    calibration_tokens,
    evaluation_tokens,
    length,
    show,
) -> list[ConversionReport]:
    reports = _without_training(
        model, output, kv_heads, methods, calibration_tokens, evaluation_tokens, length, show
    )
    for count in kv_heads if uptrain_tokens else ():
        folder = output / f"kv{count}"
        settings = job.Job(
            model,
            count,
            folder,
            calibration_tokens=calibration_tokens,
            evaluation_tokens=evaluation_tokens,
            uptrain_tokens=uptrain_tokens,
            length=length,
        )
        if (folder / "report.json").exists():
            discard(settings.partial)  # of a run that was killed at its very end
            reports.append(ConversionReport.load(folder / "report.json"))
            continue
        reports.append(job.run(settings, show))
        _write(output, reports)
    _write(output, reports)
    return reports


def _without_training(
    model, output, kv_heads, methods, calibration_tokens, evaluation_tokens, length, show
):
    reports = []
    if (output / "sweep.json").exists():
        old = [ConversionReport(data) for data in json.loads((output / "sweep.json").read_text())]
        reports = [report for report in old if not report.settings["uptrain_tokens"]]
    done = {tuple(r.settings[k] for k in ("kv_heads", "method", "refit")) for r in reports}
    parent, tokenizer = load_model(model)
    data = streams(tokenizer, train=calibration_tokens, evaluation=evaluation_tokens)
    before = None
    for count in kv_heads:
        for method in methods:
            for refit in (True, False):
                if (count, method, refit) in done:
                    continue
                with show.stage(
                    f"{method}{' + refit' if refit else ''}, {count} KV heads"
                ) as progress:
                    before = before or job.measure_parent(parent, data, length)
                    student = copy.deepcopy(parent)
                    report = gqa.convert_gqa(
                        student,
                        count,
                        data.train,
                        method=method,
                        refit=refit,
                        length=length,
                        progress=progress,
                    )
                    converted = compare(parent, student, data.evaluation, length)
                report.data["settings"] |= {"model": model, "calibration_source": data.source}
                report.data["quality"] = {**before, "converted": converted}
                reports.append(report)
                _write(output, reports)
    return reports


def _write(output: Path, reports: Sequence[ConversionReport]) -> None:
    write_text_atomic(output / "sweep.html", compare_html(reports))
    write_text_atomic(
        output / "sweep.json", json.dumps([report.data for report in reports], indent=1) + "\n"
    )
