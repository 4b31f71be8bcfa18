"""What ships: the variants of the bitmask kernels that `effattn.kernels.aot` compiles, as the
launcher would.
"""

from __future__ import annotations

from .triton_impl import EXPAND, FEW_ROWS, align, tile
from .triton_kernels import expand, product

POINTERS = {"masks_ptr": "*u8", "starts_ptr": "*i32"}


def variants(arch: str) -> list[dict]:
    """One row and several, at once with a bias and in splits; and a block of W unpacked."""
    return [
        *(_product(kind, rows) for kind in ("bf16", "fp16") for rows in (1, 16, FEW_ROWS)),
        _product("bf16", 1, splits=True),
        _product("bf16", 16, splits=True),
        _variant("expand bf16", expand, EXPAND | {"ALIGN": align(512)}, {}, dots=False),
    ]


def _product(kind: str, rows: int, splits: bool = False) -> dict:
    sizes = dict(tile(rows, 4096, 512, 132))
    sizes.pop("splits")
    pointers = {"out_ptr": "*fp32"} if splits else {}
    constexprs = {"bias_ptr": None} if splits else {}
    name = f"product {kind} of {rows}{' in splits' if splits else ''}"
    return _variant(name, product, sizes, constexprs, rows > 1, kind, pointers)


def _variant(
    name: str,
    kernel,
    sizes: dict,
    constexprs: dict,
    dots: bool,
    kind: str = "bf16",
    pointers: dict[str, str] | None = None,
) -> dict:
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constexprs = constexprs | sizes
    pointers = POINTERS | (pointers or {})
    signature = {}
    for argument in kernel.arg_names:
        usual = pointers.get(argument, f"*{kind}") if argument.endswith("_ptr") else "i32"
        signature[argument] = "constexpr" if argument in constexprs else usual
    return dict(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        forward=True,
        dots=dots,
    )
