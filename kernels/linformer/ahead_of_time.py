"""What the projection kernels ship, for `effattn.kernels.aot`; `Earlier` in the flash kernels is
here too.
"""

from __future__ import annotations

import torch

from ..flash import ahead_of_time as flash
from ..flash.triton_impl import Call
from . import triton_kernels
from .pattern import Earlier
from .triton_impl import tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = dict(w="*fp32", out="*fp32", dw="*fp32", start="*i64", mask="*i1")
MULTIPLES = ("x_b", "x_h", "x_t", "w_h", "w_k")


def variants(arch: str) -> list[dict]:
    """Head sizes 64 and 128 in bf16 with 256 slots, one in fp16, one padded, few slots (blockwise),
    and `Earlier`.
    """
    wanted = [(64, "bf16", 256, False), (128, "bf16", 256, False), (128, "fp16", 256, False)]
    wanted += [(128, "bf16", 256, True), (128, "bf16", 4, False)]
    kernels = ("project", "token_gradient", "weight_gradient")
    found = [_variant(kernel, *how, arch) for kernel in kernels for how in wanted]
    plain = dict(first=0, slots=0, tail=0, causal=False, scale=0.1, cap=0.0, rule=None)
    earlier = Call(Earlier, (64, 4, 0), masked=False, **plain)
    padded = earlier._replace(slots=64, masked=False)
    found += [
        flash.variant(arch, kernel, 128, "*bf16", earlier, "earlier")
        for kernel in ("forward", "backward_queries", "backward_keys")
    ]
    return [*found, flash.variant(arch, "forward", 128, "*bf16", padded, "earlier_padded")]


def _variant(name: str, dim: int, kind: str, slots: int, padded: bool, arch: str) -> dict:
    jitted, sizes = getattr(triton_kernels, name), dict(tile(dim, slots, DTYPES[kind], arch))
    options = {"num_warps": sizes.pop("num_warps"), "num_stages": sizes.pop("num_stages")}
    fixed = dict(D=dim, **sizes) | ({} if padded else dict(start=None, mask=None))
    fixed = {argument: value for argument, value in fixed.items() if argument in jitted.arg_names}
    signature = {}
    for argument in jitted.arg_names:
        if argument in fixed:
            signature[argument] = "constexpr"
        elif argument in ("x", "grad", "dx"):
            signature[argument] = f"*{kind}"
        else:
            signature[argument] = POINTERS.get(
                argument, "i32:16" if argument in MULTIPLES else "i32"
            )
    return dict(
        name=f"{name}_{dim}_{kind}_{slots}{'_padded' * padded}",
        kernel=jitted,
        signature=signature,
        constexprs=fixed,
        forward=name == "project",
        dots=True,
        **options,
    )
