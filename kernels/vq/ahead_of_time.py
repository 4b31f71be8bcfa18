"""What the codebook kernels ship, for `effattn.kernels.aot`."""

from __future__ import annotations

import torch

from ..flash import tiles
from . import triton_kernels
from .triton_impl import tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT32 = ("sums", "dsums", "offsets", "lse", "lse2", "delta")
POINTERS = dict.fromkeys(FLOAT32, "*fp32") | {"codes": "*i64", "counts": "*i32", "real": "*i1"}
OWN = ("k", "v", "q", "words", "out", "grad", "dq")
FORWARD = ("nearest", "summarise", "forward")


def variants(arch: str) -> list[dict]:
    """Every kernel at head sizes 64 and 128 in bf16 and 128 in fp16, 512 codes."""
    kernels = (*FORWARD, "query_gradient", "sum_gradient")
    return [
        _variant(kernel, dim, kind, arch)
        for kernel in kernels
        for dim, kind in ((64, "bf16"), (128, "bf16"), (128, "fp16"))
    ]


def _variant(name: str, dim: int, kind: str, arch: str) -> dict:
    jitted = getattr(triton_kernels, name)
    sizes = tile(name, tiles.padded(dim), DTYPES[kind], arch)
    options = {"num_warps": sizes["num_warps"], "num_stages": sizes["num_stages"]}
    fixed = dict(D=dim, V=dim, BLOCK_D=tiles.padded(dim), BLOCK_V=tiles.padded(dim), **sizes)
    fixed = {argument: value for argument, value in fixed.items() if argument in jitted.arg_names}
    signature = {}
    for argument in jitted.arg_names:
        if argument in fixed:
            signature[argument] = "constexpr"
        elif argument in OWN:
            signature[argument] = f"*{kind}"
        elif argument in ("unit", "scale"):
            signature[argument] = "fp32"
        elif argument == "count" or (argument[-2:] in ("_b", "_h", "_t") and argument != "real_b"):
            signature[argument] = "i32:16"
        else:
            signature[argument] = POINTERS.get(argument, "i32")
    return dict(
        name=f"{name}_{dim}_{kind}",
        kernel=jitted,
        signature=signature,
        constexprs=fixed,
        forward=name in FORWARD,
        dots=True,
        **options,
    )
