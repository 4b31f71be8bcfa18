"""`effattn prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effattn.prune.structured_cli import structured
from effattn.recipes.console import (
    Show,
    console,
    contexts_of,
    count_tokens,
    one_line_errors,
    quiet_libraries,
)

app = typer.Typer(
    help="Prune a checkpoint: single weights, or whole heads, FFN dimensions and layers.",
    no_args_is_help=True,
)


@app.callback()
def _root() -> None:
    """Keeps the sub-commands' names, however many there are."""


@app.command("oneshot")
@one_line_errors
def oneshot(
    output: Annotated[Path, typer.Option(help="new folder for the checkpoint and its report")],
    model: Annotated[str, typer.Option(help='"embedded", a folder, or a hub name')] = "embedded",
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            help="a share (0.5, the default), N:M with N zeros in every M "
            "(2:4), or one for each layer with commas; repeat to compare, the first one is saved"
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="to compare, the first one is saved")
    ] = "sparsegpt,wanda,magnitude",
    modules: Annotated[str, typer.Option(help="all, attention or ffn")] = "all",
    allocation: Annotated[
        str, typer.Option(help="shares by layer: uniform, or sensitivity")
    ] = "uniform",
    damping: Annotated[
        float, typer.Option(help="added to the Hessian, as a share of its mean diagonal")
    ] = 0.01,
    raise_damping: Annotated[
        bool, typer.Option("--raise-damping", help="where a factorisation fails, go on with more")
    ] = False,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text to calibrate on; repeat for more files")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a `datasets` name (or NAME:CONFIG) or folder, streamed")
    ] = None,
    column: Annotated[str | None, typer.Option(help="the dataset's text column")] = None,
    calibration_tokens: Annotated[int, count_tokens("to take Hessians of")] = "65536",
    evaluation_tokens: Annotated[int, count_tokens("held out, to measure on")] = "32768",
    length: Annotated[
        int | None,
        typer.Option(
            help="window length in tokens (default: as the model was trained, at most 2048)"
        ),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(help="load the models to measure and compare: auto (if they fit), yes, no"),
    ] = "auto",
    distill_tokens: Annotated[
        int, count_tokens("to distil on after pruning, zeros kept; 0: none")
    ] = "0",
    batch: Annotated[int, typer.Option(help="distillation windows a step and process")] = 2,
    lr: Annotated[
        float | None, typer.Option(help="peak learning rate (default: by width, 1e-3 at 256)")
    ] = None,
    ce_weight: Annotated[float, typer.Option(help="weight of cross-entropy beside the KL")] = 0.05,
    layer_weight: Annotated[
        float, typer.Option(help="weight of the distance to the dense layers' outputs")
    ] = 30.0,
    decode_contexts: Annotated[
        str, typer.Option(help="cache lengths to time decoding at, or none")
    ] = "512,4k",
    seed: Annotated[int, typer.Option(help="of the distillation's data order")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Prune linear layers in one shot (SparseGPT, Wanda, magnitude), unstructured or N:M, layer by
    layer.

    Zeros are stored like other weights: a pruned checkpoint saves no memory by itself.
    effattn.prune.pack turns 2:4 zeros into bytes and time."""
    from effattn.prune.oneshot_job import Job, run
    from effattn.recipes.jobs import Quiet, main_process

    quiet_libraries()
    job = Job(
        output=output,
        model=model,
        methods=tuple(part.strip() for part in methods.split(",") if part.strip()),
        sparsities=tuple(
            tuple(part.split(",")) if "," in part else part for part in sparsity or ("0.5",)
        ),
        modules=modules,
        allocation=allocation,
        damping=damping,
        raise_damping=raise_damping,
        text=tuple(text or ()),
        dataset=dataset,
        column=column,
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
        length=length,
        measure=measure,
        distill_tokens=distill_tokens,
        batch=batch,
        lr=lr,
        ce_weight=ce_weight,
        layer_weight=layer_weight,
        decode_contexts=contexts_of(decode_contexts),
        seed=seed,
        device=device,
    )
    main = main_process()
    report = run(job, Show() if main else Quiet())
    if main:
        console.print(report)
        console.print(f"\ncheckpoint  {output}", soft_wrap=True, highlight=False)
        console.print(
            f"report      {(output / 'report.html').absolute()}", soft_wrap=True, highlight=False
        )


app.command("structured")(structured)
