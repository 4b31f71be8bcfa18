"""`effattn quantize-kv`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
def quantize_kv(
    bits: Annotated[
        str, typer.Option(help="formats by their bits, with default options")
    ] = "8,4,2",
    formats: Annotated[
        list[str] | None,
        typer.Option(
            help='a cache spec instead, such as "int4(group=64, residual=128)"; repeat for more'
        ),
    ] = None,
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    budget_bytes_per_token: Annotated[
        float | None,
        typer.Option(
            help="make a per-layer plan of the formats (and full) "
            "that takes at most so many bytes a token, all layers together"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="new folder for the report, and the checkpoint with the plan's "
            "cache (or the only format's); a killed run resumes"
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="quantize the weights too, first: nf4 or int8")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to measure on; repeat for more files")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    evaluation_tokens: Annotated[
        int, count_tokens("to measure each format on, a step each")
    ] = "8192",
    sensitivity_tokens: Annotated[
        int, count_tokens("to measure each layer and format on")
    ] = "2048",
    length: Annotated[int, typer.Option(help="window length in tokens")] = 512,
    batch: Annotated[int, typer.Option(help="windows that are decoded side by side")] = 16,
    retrieval_length: Annotated[
        int | None,
        typer.Option(
            help="tokens of a retrieval prompt (default: three "
            "quarters of what the model was made for, at most 4096)"
        ),
    ] = None,
    retrieval_trials: Annotated[
        int, typer.Option(help="prompts a task and depth; 0: no retrieval")
    ] = 8,
    retrieval_style: Annotated[
        str | None,
        typer.Option(help="of the passkey: text, or code (default: code for the embedded model)"),
    ] = None,
    decode_contexts: Annotated[
        str, typer.Option(help="cache lengths to time decoding at, or none")
    ] = "512,4k",
    decode_batches: Annotated[str, typer.Option(help="sequences at once")] = "1,4",
    decode_steps: Annotated[int, typer.Option(help="steps to time, at most")] = 32,
    decode_seconds: Annotated[
        float, typer.Option(help="about so long for each context and batch")
    ] = 10.0,
    seed: Annotated[int, typer.Option(help="of prompts and random tokens")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Quantize the key/value cache: quality token by token, bytes, speed, and which layer should
    get how many bits.
    """
    from effattn.quant.sensitivity.job import Job, run
    from effattn.quant.sensitivity.parts import what_is_kept

    quiet_libraries()
    job = Job(
        model=model,
        bits=contexts_of(bits, "bits"),
        formats=tuple(formats or ()),
        budget=budget_bytes_per_token,
        output=output,
        weights=weights,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        evaluation_tokens=evaluation_tokens,
        sensitivity_tokens=sensitivity_tokens,
        length=length,
        batch=batch,
        retrieval_length=retrieval_length,
        retrieval_trials=retrieval_trials,
        retrieval_style=retrieval_style,
        decode_contexts=contexts_of(decode_contexts),
        decode_batches=contexts_of(decode_batches, "decode_batches"),
        decode_steps=decode_steps,
        decode_seconds=decode_seconds,
        seed=seed,
        device=device,
    )

    with when_stopped(lambda: what_is_kept(job.partial)):
        report = run(job, Show())
    wide = console if console.is_terminal else Console(width=140)  # a log's lines may be long
    wide.print(report)
    if output is not None:
        if report.data["saved"] is not None:
            console.print(f"\ncheckpoint  {output}", soft_wrap=True, highlight=False)
        console.print(
            f"report      {(output / 'report.html').absolute()}", soft_wrap=True, highlight=False
        )
