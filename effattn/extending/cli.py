"""`effattn extend`."""

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
)


@one_line_errors
def extend(
    to: Annotated[str, typer.Option(help="tokens that the model is to read, such as 32768 or 32k")],
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    rule: Annotated[
        str | None,
        typer.Option(
            help='a rule such as "yarn(length=4096)" or "rerope(window=192)+logn", or '
            "a name from the plan (default: the recommended one)"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="new folder for the checkpoint and its report; without it, only "
            "the plan is printed"
        ),
    ] = None,
    tune_tokens: Annotated[int, count_tokens("to fine-tune on; 0: none")] = "0",
    sampling: Annotated[
        str,
        typer.Option(
            help="positions while tuning: pose, random, or none (windows as long as the target)"
        ),
    ] = "pose",
    window: Annotated[
        int | None,
        typer.Option(
            help="tokens of a training window (default: the trained length; without "
            "sampling the target)"
        ),
    ] = None,
    lora: Annotated[
        int, typer.Option(help="rank of LoRA adapters to tune instead (needs peft); 0: all weights")
    ] = 0,
    batch: Annotated[int, typer.Option(help="windows a step and process")] = 1,
    lr: Annotated[float | None, typer.Option(help="peak learning rate (default: by width)")] = None,
    sequences: Annotated[
        int, typer.Option(help="held-out stretches of the target length to measure on; 0: none")
    ] = 2,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to tune and measure on; repeat for more")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    seed: Annotated[int, typer.Option(help="of the data's order and the positions")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Plan a longer context: what each position rule promises, which to take, and the checkpoint,
    tuned if need be.
    """
    from effattn.extending.job import Job, run
    from effattn.recipes.jobs import Quiet, main_process

    quiet_libraries()
    lengths = contexts_of(to, "to")
    if len(lengths) != 1:
        raise ValueError(f"to: got {to!r}, valid is one number of tokens, such as 32768 or 32k")
    job = Job(
        model=model,
        to=lengths[0],
        rule=rule,
        output=output,
        tune_tokens=tune_tokens,
        sampling=sampling,
        window=window,
        lora=lora,
        batch=batch,
        lr=lr,
        sequences=sequences,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        seed=seed,
        device=device,
    )
    main = main_process()
    report = run(job, Show() if main else Quiet())
    if main:
        wide = console if console.is_terminal else Console(width=160)  # a log's lines may be long
        wide.print(report)
        if output is not None:
            console.print(f"\ncheckpoint  {output}", soft_wrap=True, highlight=False)
            console.print(
                f"report      {(output / 'report.html').absolute()}",
                soft_wrap=True,
                highlight=False,
            )
