r"""Shear a checkpoint to an exact smaller shape, as Sheared LLaMA does: learn L0 masks and weights
together, cut, and train on with plain transformers.

    python recipes/shear.py --heads 4 --ffn 352 --output runs/half --compare
    python recipes/shear.py --model M --layers 24 --hidden 2048 \
        --domain web.txt --domain code/ --output DIR
    accelerate launch recipes/shear.py --model M --heads 4 --mask-tokens 400M \
        --continue-tokens 50000M --output DIR

`--help` lists every option; the same command is `effattn shear`.
"""

import typer

from effattn.prune.shear_cli import shear

if __name__ == "__main__":
    typer.run(shear)
