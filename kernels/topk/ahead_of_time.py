"""What the kernels of chosen blocks ship, for `effattn.kernels.aot`: built from the same tables as
the launches."""

from __future__ import annotations

import torch

from . import triton_kernels
from .triton_impl import constants

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TYPES = (
    dict.fromkeys(("chosen", "order", "begin", "at"), "*i32")
    | dict.fromkeys(("out", "lse", "share"), "*fp32")
    | dict.fromkeys(("heads", "group", "queries", "most", "blocks", "window", "sinks"), "i32")
    | dict.fromkeys(("size", "keys"), "i32:16")
    | dict.fromkeys(("unit", "scale"), "fp32")
)


def variants(arch: str) -> list[dict]:
    """All kernels at head sizes 64 and 128 in bf16, and each of the other choices once."""
    kernels = ("forward", "backward_queries", "backward_keys")
    found = [_variant(arch, kernel, size, "bf16") for kernel in kernels for size in (64, 128)]
    return [
        *found,
        _variant(arch, "forward", 128, "fp16"),
        _variant(arch, "forward", 256, "bf16"),
        _variant(arch, "forward", 64, "bf16", group=1),
    ]


def _variant(arch: str, kernel: str, size: int, kind: str, group: int = 4) -> dict:
    """With `group` query heads to a key/value head: the launcher makes a constant of 1 only."""
    function = getattr(triton_kernels, kernel)
    constexprs = constants(kernel, arch, _DTYPES[kind], size, size, group)
    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
    if group == 1:
        constexprs["group"] = 1
    signature = {}
    for name in function.arg_names:
        known = "i32:16" if name.endswith(("_b", "_h", "_t")) else f"*{kind}"
        signature[name] = "constexpr" if name in constexprs else _TYPES.get(name, known)
    return dict(
        name=f"{kernel}_{size}_{kind}{'_one_head_each' if group == 1 else ''}",
        kernel=function,
        signature=signature,
        constexprs=constexprs,
        forward=kernel == "forward",
        dots=True,
        **options,
    )
