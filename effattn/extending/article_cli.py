"""The command line of `recipes/extend_context.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from effattn.recipes.console import (
    Show,
    console,
    contexts_of,
    one_line_errors,
    quiet_libraries,
    when_stopped,
)


@one_line_errors
def extend_context(
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    rules: Annotated[
        str,
        typer.Option(
            help='names from the table, or what comes before their dash, such as "rerope,'
            'yarn,ntk-mixed"; the baseline is always there'
        ),
    ] = "",
    logn: Annotated[
        bool, typer.Option(help="each position rule a second time, with test-time log-n")
    ] = True,
    lengths: Annotated[
        str, typer.Option(help="windows (default: 1, 4 and 8 times the trained length)")
    ] = "",
    sequences: Annotated[int, typer.Option(help="stretches of the longest length")] = 8,
    period: Annotated[
        int | None,
        typer.Option(
            help="tokens after which repeated text repeats (default: one and a half "
            "trained lengths)"
        ),
    ] = None,
    retrieval: Annotated[
        str, typer.Option(help="recall, passkey, auto (what the model does best) or none")
    ] = "auto",
    retrieval_length: Annotated[
        int | None, typer.Option(help="tokens of a prompt (default: the middle one of the lengths)")
    ] = None,
    retrieval_trials: Annotated[int, typer.Option(help="prompts a depth")] = 4,
    retrieval_style: Annotated[
        str | None,
        typer.Option(help="of the passkey: text, or code (default: code for the embedded model)"),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 documents to measure on; repeat for more")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for report.{html,md,json}; a killed run resumes")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="file for the results alone; a killed run resumes")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Position rules side by side beyond the trained length: loss, copying and retrieval from far
    back.
    """
    from effattn.extending.article_job import Job, run
    from effattn.quant.sensitivity.parts import what_is_kept

    quiet_libraries()
    job = Job(
        model=model,
        rules=tuple(filter(None, map(str.strip, rules.split(",")))),
        logn=logn,
        lengths=tuple(contexts_of(lengths, "lengths")) or None,
        sequences=sequences,
        period=period,
        retrieval=retrieval,
        retrieval_length=retrieval_length,
        retrieval_trials=retrieval_trials,
        retrieval_style=retrieval_style,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        output=output,
        json=json,
        seed=seed,
        device=device,
    )

    with when_stopped(lambda: what_is_kept(job.partial)):
        report = run(job, Show())
    wide = console if console.is_terminal else Console(width=160)  # a log's lines may be long
    wide.print(report)
    if output is not None:
        console.print(
            f"\nreport      {(output / 'report.html').absolute()}", soft_wrap=True, highlight=False
        )
    if json is not None:
        console.print(f"\nresults     {json.absolute()}", soft_wrap=True, highlight=False)
