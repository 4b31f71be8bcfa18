r"""What quantizing the key/value cache costs a checkpoint, and which layer should get which bits.

    python recipes/quantize_kv.py --bits 8,4,2
    python recipes/quantize_kv.py --formats "int4(residual=64)" --formats "int2(residual=64)" \
        --output runs/cache
    python recipes/quantize_kv.py --model M --budget-bytes-per-token 40000 --output runs/planned

`--help` lists every option; the same command is `effattn quantize-kv`.
"""

import typer

from effattn.quant.sensitivity.cli import quantize_kv

if __name__ == "__main__":
    typer.run(quantize_kv)
