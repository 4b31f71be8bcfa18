"""What the ragged kernel ships, for `effattn.kernels.aot`: sizes as the launcher chooses them. The
parts are merged by `effattn.kernels.decode`'s `combine`."""

from __future__ import annotations

from ..aot import ARCHES
from ..decode.triton_impl import tile
from .triton_kernels import attend

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_POINTERS = dict(out_ptr="*fp32", lse_ptr="*fp32", begin_ptr="*i64", of_ptr="*i64")


def variants(arch: str) -> list[dict]:
    """`attend` for one query and for 16, alone and in groups."""
    rows = (
        (64, "bf16", 3, 1),
        (128, "bf16", 4, 1),
        (128, "bf16", 1, 1),
        (128, "fp16", 4, 1),
        (128, "bf16", 4, 16),
    )
    found = [_variant(arch, *row) for row in rows]
    return [*found, _variant(arch, 128, "bf16", 4, 1, softcap=True)]


def _variant(
    arch: str, dim: int, kind: str, group: int, queries: int, softcap: bool = False
) -> dict:
    shared = ARCHES[arch].shared_block
    sizes = dict(tile(dim, dim, _BYTES[kind], group * queries, shared, False))
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constexprs = dict(D=dim, DV=dim, SOFTCAP=softcap, **sizes)
    ones = dict(group=group, row_tiles=-(-group * queries // sizes["BLOCK_M"]))
    # the launcher makes a constant of 1 only
    constexprs |= {name: 1 for name, value in ones.items() if value == 1}
    signature = {}
    for argument in attend.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = _POINTERS.get(argument, f"*{kind}")
        elif argument in ("inner", "outer"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32:16" if argument in ("q_b", "q_h", "q_t") else "i32"
    capped = " softcap" if softcap else ""
    return dict(
        name=f"ragged d{dim} {kind} g{group} q{queries}{capped}",
        kernel=attend,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        forward=True,
        dots=True,
    )
