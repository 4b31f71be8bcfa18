"""Pretrain the embedded model: a small multi-head Llama on the source of Python's standard library.

    python recipes/pretrain_embedded.py --output runs/embedded --tokens 12_000_000

Run it again to go on after a kill. With more than one GPU: `accelerate launch
recipes/pretrain_embedded.py ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effattn.embedded.pretrain import pretrain
from effattn.recipes.console import one_line_errors


@one_line_errors
def main(
    output: Annotated[
        Path, typer.Option(help="where the checkpoint, the tokenizer and the card go")
    ],
    tokens: Annotated[int, typer.Option(help="training tokens")] = 12_000_000,
    hidden: Annotated[int, typer.Option(help="hidden size, a multiple of 16")] = 256,
    layers: Annotated[int, typer.Option(help="decoder layers")] = 4,
    vocabulary: Annotated[int, typer.Option(help="tokenizer entries")] = 3072,
    length: Annotated[int, typer.Option(help="training length in tokens")] = 512,
    batch: Annotated[int, typer.Option(help="windows a step and a process")] = 4,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2e-3,
    compile: Annotated[bool, typer.Option(help="torch.compile the model")] = False,
) -> None:
    card = pretrain(
        output,
        train_tokens=tokens,
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        length=length,
        batch=batch,
        lr=lr,
        compile=compile,
    )
    print(
        f"{card['parameters']:,} parameters, {card['train_tokens']:,} tokens: "
        f"{card['bits_per_byte']:.3f} bits per byte (xz -9e: {card['bits_per_byte_xz_9e']:.3f}), "
        f"perplexity {card['perplexity']:.2f} -> {output}"
    )


if __name__ == "__main__":
    typer.run(main)
