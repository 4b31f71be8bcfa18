r"""Cut heads, FFN dimensions and layers out of a checkpoint; what comes out is a smaller plain
model.

    python recipes/prune_structured.py --model embedded --ffn 25% --output runs/narrow
    python recipes/prune_structured.py --heads 4 --ffn 528 \
        --criterion taylor --criterion random --output runs/small
    python recipes/prune_structured.py --layers 3 --criterion block_influence --output runs/shallow

A whole number is how many stay, a share is how much is removed. `--help` lists every option; the
same command is `effattn prune structured`."""

import typer

from effattn.prune.structured_cli import structured

if __name__ == "__main__":
    typer.run(structured)
