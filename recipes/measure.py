r"""What a checkpoint costs to run: time to first token, time per token, memory and bandwidth,
variants side by side.

    python recipes/measure.py --contexts 1k,4k,16k --html measure.html
    python recipes/measure.py --model M --variant "window=sliding(window=1024)" \
        --variant "gqa=heads=gqa(kv_heads=2)"

`--help` lists every option; the same command is `effattn measure`, and `effattn compare` compares
two results."""

import typer

from effattn.recipes.cli import measure

if __name__ == "__main__":
    typer.run(measure)
