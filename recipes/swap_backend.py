r"""Swap a checkpoint's attention pattern, and see what that does: perplexity by context, streaming,
generated text.

    python recipes/swap_backend.py --model embedded --pattern "sliding(window=256, sinks=4)"
    python recipes/swap_backend.py --model M \
        --pattern '{"0-1": "dense", "2-": "sliding(window=512)"}' --output DIR

`--help` lists every option; the same command is `effattn swap`.
"""

import typer

from effattn.recipes.cli import swap

if __name__ == "__main__":
    typer.run(swap)
