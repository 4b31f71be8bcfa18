"""What ships: the bandwidth kernels, for `effattn.kernels.aot`. They have one size and no matrix
products.
"""

from __future__ import annotations

from . import triton_kernels as kernels
from .triton_impl import TILE

KINDS = {
    "source_ptr": "*fp32",
    "out_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "value": "fp32",
    "n": "i64",
    "steps": "i32",
    "BLOCK": "constexpr",
}


def variants(arch: str) -> list[dict]:
    """Every kernel, with a length that needs 64 bits; the same on every architecture."""
    found = []
    for name in ("copy", "read", "write", "nothing"):
        kernel = getattr(kernels, name)
        signature = {argument: KINDS[argument] for argument in kernel.arg_names}
        constexprs = {"BLOCK": TILE["BLOCK"]} if "BLOCK" in signature else {}
        warps = TILE["num_warps"] if constexprs else 1
        found.append(
            dict(
                name=name,
                kernel=kernel,
                signature=signature,
                constexprs=constexprs,
                num_warps=warps,
                num_stages=3,
                forward=True,
                dots=False,
            )
        )
    return found
