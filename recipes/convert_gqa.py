r"""Convert a checkpoint's attention from MHA to GQA or MQA.

    python recipes/convert_gqa.py --model embedded --kv-heads 2 --output runs/gqa2
    accelerate launch recipes/convert_gqa.py --model M --kv-heads 8 \
        --uptrain-tokens 50M --output DIR

`--help` lists every option; the same command is `effattn convert-gqa`.
"""

import typer

from effattn.recipes.cli import convert_gqa

if __name__ == "__main__":
    typer.run(convert_gqa)
