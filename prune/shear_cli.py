"""`effattn shear`."""

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
)


@one_line_errors
def shear(
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    output: Annotated[
        Path | None, typer.Option(help="new folder for the checkpoint and its report")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="hidden dimensions to keep")] = None,
    heads: Annotated[
        int | None, typer.Option(help="key/value heads a layer to keep, with their query heads")
    ] = None,
    ffn: Annotated[int | None, typer.Option(help="FFN dimensions a layer to keep")] = None,
    layers: Annotated[int | None, typer.Option(help="layers to keep")] = None,
    domain: Annotated[
        list[Path] | None,
        typer.Option(help="a UTF-8 text file or a folder of them; repeat for more domains"),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name, NAME:CONFIG or folder, as one domain")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    mask_tokens: Annotated[int, count_tokens("to learn masks on")] = "60000",
    recover_tokens: Annotated[
        int, count_tokens("to learn the parent's predictions on after cutting; 0: none")
    ] = "1140000",
    continue_tokens: Annotated[int, count_tokens("of text to train on then; 0: none")] = "0",
    evaluation_tokens: Annotated[int, count_tokens("held out, to measure on")] = "32768",
    length: Annotated[int, typer.Option(help="window length in tokens")] = 512,
    batch: Annotated[int, typer.Option(help="windows a step and process")] = 4,
    lr: Annotated[
        float | None,
        typer.Option(help="peak learning rate while masks are learned (default: by width)"),
    ] = None,
    recover_lr: Annotated[
        float | None,
        typer.Option(
            help="the same while the parent's predictions are learned (default: by width)"
        ),
    ] = None,
    continue_lr: Annotated[
        float | None, typer.Option(help="the same for training on (default: by width)")
    ] = None,
    mask_lr: Annotated[
        float | None, typer.Option(help="of the masks' log alphas (default: by steps)")
    ] = None,
    multiplier_lr: Annotated[
        float | None, typer.Option(help="of the Lagrange multipliers (default: by steps)")
    ] = None,
    warm_start: Annotated[
        str, typer.Option(help="criterion that ranks the gates at the start, or none")
    ] = "obs",
    start: Annotated[float, typer.Option(help="log alpha of gates that no criterion ranks")] = 2.5,
    ramp: Annotated[
        float, typer.Option(help="share of the mask stage until the whole target is asked for")
    ] = 0.2,
    distill: Annotated[
        bool, typer.Option(help="masks learn the parent's predictions instead of the text")
    ] = True,
    compensate: Annotated[
        bool, typer.Option(help="least squares for o_proj and down_proj after cutting")
    ] = True,
    loading: Annotated[
        str, typer.Option(help="domain weights: clamped (paper), signed (its code), fixed")
    ] = "clamped",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="also train this on as many tokens: scratch, structured "
            "(one-shot pruning) or taught (the same, by the parent); repeat for more"
        ),
    ] = None,
    compare: Annotated[bool, typer.Option(help="all baselines that the stages have")] = False,
    scratch_lr: Annotated[
        float | None, typer.Option(help="of the baseline from scratch (default: by width)")
    ] = None,
    decode_contexts: Annotated[
        str, typer.Option(help="cache lengths to time decoding at, or none")
    ] = "512,4k",
    seed: Annotated[int, typer.Option(help="of data order and gates")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Shear a model to an exact smaller shape: learned L0 masks, cut, and trained on (Sheared
    LLaMA).
    """
    from effattn.prune.shear_job import Job, run
    from effattn.prune.shearing.report import BASELINES
    from effattn.recipes.jobs import Quiet, main_process

    quiet_libraries()
    baselines = tuple(dict.fromkeys(baseline or ()))
    if compare:
        baselines = tuple(name for name in BASELINES if recover_tokens or name != "taught")
    job = Job(
        model=model,
        output=output,
        hidden=hidden,
        heads=heads,
        ffn=ffn,
        layers=layers,
        domains=tuple(domain or ()),
        dataset=dataset,
        column=column,
        mask_tokens=mask_tokens,
        recover_tokens=recover_tokens,
        continue_tokens=continue_tokens,
        evaluation_tokens=evaluation_tokens,
        length=length,
        batch=batch,
        lr=lr,
        recover_lr=recover_lr,
        continue_lr=continue_lr,
        mask_lr=mask_lr,
        multiplier_lr=multiplier_lr,
        warm_start=None if warm_start == "none" else warm_start,
        start=start,
        ramp=ramp,
        distill=distill,
        compensate=compensate,
        loading=loading,
        baselines=baselines,
        scratch_lr=scratch_lr,
        decode_contexts=contexts_of(decode_contexts),
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
