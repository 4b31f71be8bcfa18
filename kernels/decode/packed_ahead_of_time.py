"""The variants of the packed decode kernel that ship; `ahead_of_time` lists them among the
others.
"""

from __future__ import annotations

import torch

from ..aot import ARCHES
from ..flash.triton_bias import alibi
from ..pack.codes import Coding
from .packed_kernels import attend_packed
from .packed_triton import code, tile, turned, whole
from .triton_pieces import in_window
from .turn import Turn

POINTERS = {
    "kc_ptr": "*u8",
    "ks_ptr": "*bf16",
    "kz_ptr": "*fp16",
    "vc_ptr": "*u8",
    "vs_ptr": "*bf16",
    "vz_ptr": "*fp16",
    "out_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "start_ptr": "*i64",
    "mask_ptr": "*i1",
    "packed_numbers_ptr": "*i64",
    "rest_numbers_ptr": "*i64",
    "total_ptr": "*i64",
    "inv_freq_ptr": "*fp32",
    "params_ptr": "*fp32",
}
OPTIONAL = (
    "q_first_ptr",
    "k_first_ptr",
    "v_first_ptr",
    "start_ptr",
    "mask_ptr",
    "packed_numbers_ptr",
    "rest_numbers_ptr",
    "total_ptr",
    "params_ptr",
)
FLOATS = ("inner", "outer", "turn_scaling", "slow")
UNEVEN = ("mask_b",)  # strides that may be no multiple of 16


def variants(arch: str) -> list[dict]:
    """Every kind of codes with one query, several queries, everything on, and keys that turn."""
    limits = ARCHES[arch]
    on = limits.shared_block, limits.target.backend == "cuda"
    rerope = Turn(torch.ones(64), window=512, q_far=torch.empty(0))
    return [
        _attend(on, "int8 d128 g4", "int8", 128),
        _attend(on, "int8 d64 g1", "int8", 64, lines=1),
        _attend(on, "int4 d128 g4", "int4", 64),
        _attend(on, "int4 d128 group 32 g4", "int4", 32),
        _attend(on, "int4 d64 g4", "int4", 64, dim=64),
        _attend(on, "int2 d128 g4", "int2", 32),
        _attend(on, "fp8 d128 g4", "fp8", 128),
        _attend(on, "int4 d128 g4 16 queries", "int4", 64, lines=64),
        _attend(on, "int4 all on d128 g4", "int4", 64, everything=True),
        _attend(on, "int4 rope d128 g4", "int4", 64, turn=Turn(torch.ones(64))),
        _attend(on, "int4 rerope d128 g4", "int4", 64, turn=rerope),
    ]


def _attend(
    on: tuple[int, bool],
    name: str,
    kind: str,
    group: int,
    dim: int = 128,
    lines: int = 4,
    everything: bool = False,
    turn: Turn | None = None,
) -> dict:
    k, v = (
        Coding(kind, axis, min(group, dim) if axis == "token" else group, kind in ("int8", "fp8"))
        for axis in ("channel", "token")
    )
    shared, pairs = on
    sizes = dict(tile(k, v, dim, dim, 2, lines, shared, 2 * everything + (turn is not None)))
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constexprs = dict(
        K_CODE=code(k, dim, len(turn.inv_freq) if turn else None, whole(k, v), pairs),
        V_CODE=code(v, dim, None, whole(k, v), pairs),
        TURN=turned(turn),
        NEAR=in_window if everything else None,
        CAUSAL=True,
        SOFTCAP=everything,
        SLOTS=everything,
        BIAS=alibi if everything else None,
        row_tiles=1,
        **sizes,
    )
    if not k.has_zero:
        constexprs |= dict.fromkeys(("kz_ptr", "vz_ptr"))
    if v.group == dim:
        constexprs["vs_n"] = 1  # the launcher makes a constant of 1
    if not everything:
        constexprs |= dict.fromkeys(OPTIONAL)
    if turn is None:
        constexprs["inv_freq_ptr"] = None
    if turn is None or turn.window is None:
        constexprs["q_far_ptr"] = None
    signature = {}
    for argument in attend_packed.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, "*bf16")
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            stride = (
                argument[-2:] in ("_b", "_h", "_t", "_n")
                and argument not in UNEVEN
                and argument[:4] not in ("vs_n",)
            )
            signature[argument] = "i32:16" if stride else "i32"
    return dict(
        name=f"packed {name}",
        kernel=attend_packed,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        forward=True,
        dots=True,
    )
