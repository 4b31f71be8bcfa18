"""What the LSH kernels ship, for `effattn.kernels.aot`: built from the same tables as the
launches.
"""

from __future__ import annotations

import torch

from .triton_impl import constants, jitted

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_INDICES = ("order", "code", "query_order", "query_code", "low", "high", "begin", "end")
_NUMBERS = ("heads", "group", "rows", "length", "store", "own", "step", "tiles")
_TYPES = (
    dict.fromkeys(_INDICES, "*i32")
    | dict.fromkeys(("parts", "sums", "lse", "delta", "dq", "dk", "dv"), "*fp32")
    | dict.fromkeys(_NUMBERS, "i32")
    | dict.fromkeys(("unit", "scale"), "fp32")
)


def variants(arch: str) -> list[dict]:
    """All kernels at head sizes 64 and 128 in bf16, and each of the other choices once."""
    kernels = ("forward", "backward_queries", "backward_keys", "combine", "backward_own")
    found = [_variant(arch, kernel, size, "bf16") for kernel in kernels for size in (64, 128)]
    return [
        *found,
        _variant(arch, "forward", 128, "fp16"),
        _variant(arch, "forward", 256, "bf16"),
        _variant(arch, "forward", 64, "bf16", causal=False),
        _variant(arch, "backward_keys", 64, "bf16", causal=False),
        _variant(arch, "combine", 64, "bf16", shared=True),
        _variant(arch, "forward", 64, "bf16", group=1),
    ]


def _variant(
    arch: str,
    kernel: str,
    size: int,
    kind: str,
    causal: bool = True,
    shared: bool = False,
    group: int = 4,
) -> dict:
    """With four rounds, and `group` query heads to a key/value head: the launcher makes a constant
    of 1 only.
    """
    function = jitted(kernel)
    given = constants(kernel, arch, _DTYPES[kind], size, size) | dict(
        ROUNDS=4, CAUSAL=causal, SHARED=shared
    )
    options = {name: given.pop(name) for name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in given.items() if name in function.arg_names}
    if group == 1:
        constexprs["group"] = 1
    signature = {}
    for name in function.arg_names:
        known = "i32:16" if name.endswith(("_b", "_h", "_t")) else f"*{kind}"
        signature[name] = "constexpr" if name in constexprs else _TYPES.get(name, known)
    products = kernel in ("forward", "backward_queries", "backward_keys")
    extra = "" if causal else "_both_ways"
    extra += "_shared" if shared else "_one_head_each" if group == 1 else ""
    return dict(
        name=f"{kernel}_{size}_{kind}{extra}",
        kernel=function,
        signature=signature,
        constexprs=constexprs,
        forward=not kernel.startswith("backward"),
        dots=products,
        **options,
    )
