"""`effattn prune structured`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effattn.recipes.console import (
    Show,
    console,
    contexts_of,
    count_tokens,
    one_line_errors,
    quiet_libraries,
    when_stopped,
)


@one_line_errors
def structured(
    output: Annotated[Path, typer.Option(help="new folder for the checkpoint and its report")],
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    heads: Annotated[
        str | None,
        typer.Option(
            help="heads (with GQA key/value heads, with their query heads): how many "
            "stay in each layer (4), or the share that is removed (0.5 or 50%)"
        ),
    ] = None,
    ffn: Annotated[str | None, typer.Option(help="FFN dimensions: the same")] = None,
    layers: Annotated[str | None, typer.Option(help="layers: the same")] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            help="taylor (default), obs, michel, activation, flap, "
            "wanda_sum, block_influence or random, or by target: "
            "heads=flap,layers=block_influence; repeat to compare, the "
            "first one is saved"
        ),
    ] = None,
    compensate: Annotated[
        bool, typer.Option(help="solve the output projections again by least squares")
    ] = True,
    bias: Annotated[
        bool,
        typer.Option(
            "--bias",
            help="give them biases where the class's config can (FLAP: with --no-compensate)",
        ),
    ] = False,
    without: Annotated[bool, typer.Option(help="measure it without solving again, too")] = True,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to calibrate on; repeat for more files")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    calibration_tokens: Annotated[int, count_tokens("to score and solve on")] = "65536",
    evaluation_tokens: Annotated[int, count_tokens("held out, to measure on")] = "32768",
    length: Annotated[
        int | None,
        typer.Option(
            help="window length in tokens (default: as the model was trained, at most 2048)"
        ),
    ] = None,
    decode_contexts: Annotated[
        str, typer.Option(help="cache lengths to time decoding at, or none")
    ] = "512,4k",
    seed: Annotated[int, typer.Option(help="of the random criterion")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Cut whole heads, FFN dimensions and layers out: a smaller plain checkpoint, and what that
    cost and saved.
    """
    from effattn.prune.structured_job import Job, parse_amount, run

    quiet_libraries()
    job = Job(
        output=output,
        model=model,
        heads=parse_amount("heads", heads),
        ffn=parse_amount("ffn", ffn),
        layers=parse_amount("layers", layers),
        criteria=tuple(criterion or ("taylor",)),
        compensate=compensate,
        bias=bias,
        without=without,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
        length=length,
        decode_contexts=contexts_of(decode_contexts),
        seed=seed,
        device=device,
    )
    with when_stopped(lambda: "stopped; nothing was written"):
        report = run(job, Show())
    console.print(report)
    console.print(f"\ncheckpoint  {output}", soft_wrap=True, highlight=False)
    console.print(
        f"report      {(output / 'report.html').absolute()}", soft_wrap=True, highlight=False
    )
