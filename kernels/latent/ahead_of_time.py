"""What ships: the variants of the kernels over latents that `effattn.kernels.aot` compiles."""

from __future__ import annotations

from ..aot import ARCHES
from ..decode.triton_impl import combine_tile
from ..decode.triton_kernels import combine
from ..decode.triton_pieces import in_window
from ..flash.triton_bias import alibi
from .triton_impl import key_tile, latent_tile, sum_tile
from .triton_kernels import gather, score_keys, score_latents

ABSENT = ("q_first_ptr", "start_ptr", "mask_ptr", "slots_at_ptr", "ring_ptr", "params_ptr")
POINTERS = {
    "key_bias_ptr": "*bf16",
    "scores_ptr": "*fp32",
    "out_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "parts_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "inv_freq_ptr": "*fp32",
    "params_ptr": "*fp32",
    "start_ptr": "*i64",
    "mask_ptr": "*i1",
    "slots_at_ptr": "*i64",
    "ring_ptr": "*i64",
}
MULTIPLES = ("q_b", "q_h", "q_t", "f_b", "f_h", "f_t", "c_b", "c_n", "rank")
FLOATS = ("inner", "outer", "scaling")
GROUP, RANK = 4, 1024  # query heads of a K/V head, of which there are 8; numbers of a latent


def variants(arch: str) -> list[dict]:
    """Scores of keys at head sizes 64 and 128, plain and with everything on, of latents, and their
    sums; sizes as the launches choose them for `arch`."""
    shared = ARCHES[arch].shared_block
    return [
        *(_keys(dim, everything, shared) for dim in (64, 128) for everything in (False, True)),
        _latents(shared),
        *(_sums(rank, lines, shared) for rank, lines in ((64, 9), (RANK, 32))),
        _variant("combine", combine, {"DV": 512, **combine_tile(512)}, dots=False),
    ]


def _keys(dim: int, everything: bool, shared: int) -> dict:
    fixed = dict(
        D=dim,
        R2=dim // 2,
        INTERLEAVED=False,
        NEAR=in_window if everything else None,
        SOFTCAP=everything,
        BIAS=alibi if everything else None,
        HEAD=everything,
        row_tiles=1,
        **key_tile(dim, dim // 2, 2, GROUP, shared),
    )
    if not everything:
        fixed |= dict.fromkeys(ABSENT)
    name = f"keys d{dim} bf16" + (" all on" if everything else "")
    return _variant(name, score_keys, fixed)


def _latents(shared: int) -> dict:
    fixed = dict(NEAR=None, BIAS=None, HEAD=False, **latent_tile(2, 8 * GROUP, shared))
    present = score_latents.arg_names
    fixed |= {name: None for name in ABSENT if name in present}
    return _variant("latents bf16", score_latents, fixed)


def _sums(rank: int, lines: int, shared: int) -> dict:
    fixed = dict(HEAD=False, row_tiles=1, start_ptr=None, **sum_tile(rank, 2, lines, shared))
    return _variant(f"sums r{rank} bf16", gather, fixed)


def _variant(name: str, kernel, fixed: dict, dots: bool = True) -> dict:
    fixed = dict(fixed)
    warps, stages = fixed.pop("num_warps"), fixed.pop("num_stages", 3)
    signature = {}
    for argument in kernel.arg_names:
        if argument in fixed:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, "*bf16")
        elif argument in FLOATS:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32:16" if argument in MULTIPLES else "i32"
    return dict(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=fixed,
        num_warps=warps,
        num_stages=stages,
        forward=True,
        dots=dots,
    )
