"""What ships: the variants of the decode kernels that `effattn.kernels.aot` compiles, as the
launcher would.
"""

from __future__ import annotations

from itertools import product

import torch

from ..aot import ARCHES
from ..flash.triton_bias import alibi
from . import packed_ahead_of_time
from .triton_impl import combine_tile, tile, turned
from .triton_kernels import attend, combine
from .triton_pieces import in_blocks, in_window
from .triton_turned import attend_turned
from .turn import Turn

ABSENT = ("q_first_ptr", "start_ptr", "mask_ptr", "slots_at_ptr", "ring_ptr", "counts_ptr")
POINTERS = {
    "out_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "start_ptr": "*i64",
    "mask_ptr": "*i1",
    "slots_at_ptr": "*i64",
    "ring_ptr": "*i64",
    "counts_ptr": "*u8",
    "params_ptr": "*fp32",
    "inv_freq_ptr": "*fp32",
}
STRIDES = (
    "q_b",
    "q_h",
    "q_t",
    "r_b",
    "r_h",
    "r_t",
    "f_b",
    "f_h",
    "f_t",
    "k_b",
    "k_h",
    "k_n",
    "v_b",
    "v_h",
    "v_n",
)
FLOATS = ("inner", "outer", "scaling", "slow")


def variants(arch: str) -> list[dict]:
    """`attend` plain, windowed and with everything on, over keys that turn, and `combine`; sizes as
    `tile` chooses them for `arch`."""
    shared = ARCHES[arch].shared_block
    names = {None: "full", in_window: "window", in_blocks: "blocks"}
    found = [
        _attend(f"{names[near]} d{dim} {kind} g{group}", dim, kind, group, near, shared)
        for dim, kind, group, near in (
            *product((64, 128), ("bf16",), (1, 4), (None, in_window)),
            (64, "fp16", 4, in_window),
            (128, "fp16", 4, None),
            (128, "bf16", 4, in_blocks),
        )
    ]
    found += [
        _attend(f"all on d{dim} bf16 g4", dim, "bf16", 4, in_window, shared, everything=True)
        for dim in (64, 128)
    ]
    rules = {"rope": {}, "rerope": dict(window=512), "leaky": dict(window=512, slow=16.0)}
    found += [
        _attend(
            f"{name} d{dim} bf16 g4", dim, "bf16", 4, None, shared, turn=_turn(dim, **rules[name])
        )
        for name, dim in (("rope", 128), ("rerope", 64), ("rerope", 128), ("leaky", 128))
    ]
    return [*found, *(_combine(dim) for dim in (64, 128)), *packed_ahead_of_time.variants(arch)]


def _turn(dim: int, **settings) -> Turn:
    return Turn(torch.ones(dim // 2), q_far=torch.empty(0) if settings else None, **settings)


def _attend(
    name: str,
    dim: int,
    kind: str,
    group: int,
    near,
    shared: int,
    everything: bool = False,
    turn: Turn | None = None,
) -> dict:
    """One query token: rows are the group's heads."""
    sizes = dict(tile(dim, dim, 2, group, shared, everything or turn is not None, turn is not None))
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constexprs = dict(
        D=dim,
        DV=dim,
        NEAR=near,
        CAUSAL=True,
        SOFTCAP=everything,
        BIAS=alibi if everything else None,
        HEAD=everything,
        group=group,
        row_tiles=1,
        **sizes,
    )
    if group > 1:
        del constexprs["group"]  # the launcher makes a constant of 1 only
    if not everything:
        constexprs |= dict.fromkeys((*ABSENT, "params_ptr"))
    kernel = attend if turn is None else attend_turned
    if turn is not None:
        constexprs = turned(turn, constexprs) | ({} if turn.window else {"q_far_ptr": None})
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, f"*{kind}")
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32:16" if argument in STRIDES else "i32"
    return dict(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        forward=True,
        dots=True,
    )


def _combine(dim: int) -> dict:
    sizes = dict(combine_tile(dim))
    warps = sizes.pop("num_warps")
    signature = dict(
        parts_ptr="*fp32",
        sums_ptr="*fp32",
        out_ptr="*bf16",
        lse_ptr="*fp32",
        splits="i32",
        rows="i32",
        DV="constexpr",
        BLOCK_DV="constexpr",
        CHUNK="constexpr",
    )
    return dict(
        name=f"combine d{dim} bf16",
        kernel=combine,
        signature=signature,
        constexprs=sizes,
        num_warps=warps,
        num_stages=3,
        forward=True,
        dots=False,
    )
