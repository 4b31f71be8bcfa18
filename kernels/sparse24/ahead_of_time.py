"""What ships: the variants of the 2:4 kernel that `effattn.kernels.aot` compiles, as the launcher
would.
"""

from __future__ import annotations

from .triton_impl import tile
from .triton_kernels import product


def variants(arch: str) -> list[dict]:
    """One row and several, at once with a bias, and in splits."""
    return [
        *(_variant(kind, rows, splits=False) for kind in ("bf16", "fp16") for rows in (1, 16)),
        *(_variant("bf16", rows, splits=True) for rows in (1, 16)),
    ]


def _variant(kind: str, rows: int, splits: bool) -> dict:
    sizes = dict(tile(rows, 2, 4096, 512, 132))
    sizes.pop("splits")
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constexprs = sizes | ({"bias_ptr": None} if splits else {})
    pointers = {"indices_ptr": "*u8", "out_ptr": "*fp32" if splits else f"*{kind}"}
    signature = {}
    for argument in product.arg_names:
        usual = pointers.get(argument, f"*{kind}") if argument.endswith("_ptr") else "i32:16"
        usual = "i32" if argument in ("rows", "tiles_a_split") else usual
        signature[argument] = "constexpr" if argument in constexprs else usual
    name = f"product {kind} of {rows}{' in splits' if splits else ''}"
    return dict(
        name=name,
        kernel=product,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        forward=True,
        dots=rows > 1,
    )
