"""`effattn linearize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effattn.recipes.console import Show, console, count_tokens, one_line_errors, quiet_libraries


@one_line_errors
def linearize(
    pattern: Annotated[
        str, typer.Option(help='an approximate backend, JSON from layers to specs, or "none"')
    ] = "linear(feature_map='hedgehog')",
    projections: Annotated[
        str | None, typer.Option(help="monarch(...) instead of, or beside, a pattern")
    ] = None,
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    output: Annotated[
        Path | None, typer.Option(help="new folder for the checkpoint and its report")
    ] = None,
    keep_every: Annotated[
        int, typer.Option(help="keep every n-th layer exact, as --keep says; 0: none")
    ] = 0,
    keep: Annotated[str, typer.Option(help="what those layers get")] = "sliding(window=256)",
    fit_decay: Annotated[
        bool, typer.Option(help="choose a decay for every head of a `linear` without one")
    ] = True,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to train on; repeat for more files")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    transfer_tokens: Annotated[int, count_tokens("of attention transfer; 0: none")] = "150000",
    distil_tokens: Annotated[int, count_tokens("of distillation; 0: none")] = "450000",
    evaluation_tokens: Annotated[int, count_tokens("held out, to measure on")] = "32768",
    length: Annotated[int, typer.Option(help="window length in tokens")] = 512,
    batch: Annotated[int, typer.Option(help="windows a step and process")] = 1,
    transfer_lr: Annotated[float, typer.Option(help="peak learning rate of the transfer")] = 3e-3,
    lr: Annotated[
        float | None,
        typer.Option(help="peak learning rate of the distillation (default: by width)"),
    ] = None,
    transfer_trainable: Annotated[
        str, typer.Option(help="what transfer trains: attention, or maps")
    ] = "attention",
    trainable: Annotated[
        str, typer.Option(help="what distillation trains: attention, or all")
    ] = "attention",
    lora: Annotated[
        int, typer.Option(help="rank of LoRA adapters to distil instead (needs peft); 0: none")
    ] = 0,
    seed: Annotated[int, typer.Option(help="of the data's order")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Replace softmax attention by an approximate backend, and bring the quality back: transfer,
    then distillation.
    """
    from effattn.linearizing.job import Job, run
    from effattn.recipes.jobs import Quiet, main_process

    quiet_libraries()
    job = Job(
        model=model,
        output=output,
        pattern=None if pattern == "none" else pattern,
        projections=projections,
        keep_every=keep_every,
        keep=keep,
        fit_decay=fit_decay,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        transfer_tokens=transfer_tokens,
        distil_tokens=distil_tokens,
        evaluation_tokens=evaluation_tokens,
        length=length,
        batch=batch,
        transfer_lr=transfer_lr,
        lr=lr,
        transfer_trainable=transfer_trainable,
        trainable=trainable,
        lora=lora,
        seed=seed,
        device=device,
    )
    main = main_process()
    report = run(job, Show() if main else Quiet())
    if main:
        console.print(report)
        if output is not None:
            console.print(f"\ncheckpoint  {output}", soft_wrap=True, highlight=False)
            console.print(
                f"report      {(output / 'report.html').absolute()}",
                soft_wrap=True,
                highlight=False,
            )
