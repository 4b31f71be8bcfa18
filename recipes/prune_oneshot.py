"""Prune a checkpoint's linear layers in one shot: SparseGPT, Wanda or magnitude, unstructured or
N:M.

    python recipes/prune_oneshot.py --model embedded --sparsity 2:4 --output runs/sparse24
    # one layer in memory at a time
    python recipes/prune_oneshot.py --model DIR --measure no --output DIR2
    accelerate launch recipes/prune_oneshot.py --model M --distill-tokens 50M --output DIR

Zeros are stored like other weights and save no memory by themselves; effattn.prune.pack turns 2:4
zeros into bytes. A killed run goes on at the layer where it stopped. `--help` lists every option;
the same command is `effattn prune oneshot`."""

import typer

from effattn.prune.cli import oneshot

if __name__ == "__main__":
    typer.run(oneshot)
