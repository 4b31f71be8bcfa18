r"""Replace a checkpoint's softmax attention by an approximate backend, or its projections by
structured ones, and bring the quality back by attention transfer and distillation.

    python recipes/linearize.py --pattern "linear(feature_map='hedgehog')" \
        --keep-every 4 --output runs/linear
    python recipes/linearize.py --pattern none --projections "monarch(blocks=16, ratio=0.5)" \
        --output runs/monarch
    accelerate launch recipes/linearize.py --model M --distil-tokens 50M --output DIR

`--help` lists every option; the same command is `effattn linearize`.
"""

import typer

from effattn.linearizing.cli import linearize

if __name__ == "__main__":
    typer.run(linearize)
