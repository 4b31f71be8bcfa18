r"""Position rules side by side beyond a model's trained length: the table of the ReRoPE article, on
any checkpoint.

    python recipes/extend_context.py --output runs/positions
    python recipes/extend_context.py --rules rerope,yarn --sequences 4 \
        --lengths 512,4k --output runs/few

`--help` lists every option. To choose a rule for a checkpoint and write it: `effattn extend`.
"""

import typer

from effattn.extending.article_cli import extend_context

if __name__ == "__main__":
    typer.run(extend_context)
