"""What ships: the variants of the Monarch kernels that `effattn.kernels.aot` compiles, as the
launcher would.
"""

from __future__ import annotations

from ..aot import ARCHES
from . import triton_kernels
from .triton_impl import gradient_tile, one_pass_tile, product_tile

# in = out, blocks, rank: the usual ranks of 32 and 64 blocks, and half of the dense weight's
# parameters with 16
SIZES = ((4096, 32, 4), (4096, 64, 1), (4096, 16, 64), (1024, 32, 1), (4096, 32, 8), (2048, 32, 2))
ONES = ("x_k", "f_k", "s_a", "y_j")  # strides that are 1 in a forward pass


def variants(arch: str) -> list[dict]:
    """`both` at each size, and transposed as for the gradient of x; `one` for few rows and many;
    `outer`.
    """
    shared = ARCHES[arch].shared_block
    found = [_both(size, "bf16", shared) for size in SIZES]
    found += [_both(SIZES[0], "fp16", shared), _both(SIZES[0], "bf16", shared, transposed=True)]
    found += [_one(SIZES[0], "bf16", rows, arch) for rows in (1, 32, 4096)]
    return [*found, _one(SIZES[0], "bf16", 4096, arch, transposed=True), _outer(SIZES[0], "bf16")]


def _both(size: tuple[int, int, int], kind: str, shared: int, transposed: bool = False) -> dict:
    width, blocks, rank = size
    tile = dict(one_pass_tile(width // blocks, rank, 2, shared))
    ones = {"x_i", "f_a" if rank > 1 else "f_j", "s_t", "y_t"} if transposed else set(ONES)
    if rank == 1:
        ones |= {"rank"}
    name = f"both {width} b{blocks} r{rank} {kind}{' transposed' if transposed else ''}"
    return _variant(
        name,
        triton_kernels.both,
        kind,
        tile,
        ones | {"bias"} if transposed else ones,
        not transposed,
    )


def _one(
    size: tuple[int, int, int], kind: str, rows: int, arch: str, transposed: bool = False
) -> dict:
    width, blocks, _ = size
    tile = dict(product_tile(rows, width // blocks, width // blocks, 2))
    ones = {"x_i", "f_q", "y_inner", "bias"} if transposed else {"x_k", "f_k", "y_inner", "bias"}
    name = f"one {width} b{blocks} {kind} n{rows}{' transposed' if transposed else ''}"
    return _variant(name, triton_kernels.one, kind, tile, ones, not transposed)


def _outer(size: tuple[int, int, int], kind: str) -> dict:
    width, blocks, _ = size
    return _variant(
        f"outer {width} b{blocks} {kind}",
        triton_kernels.outer,
        kind,
        dict(gradient_tile(2)),
        {"g_q", "x_k"},
        forward=False,
    )


def _variant(
    name: str, kernel, kind: str, tile: dict, ones: set[str], forward: bool = True
) -> dict:
    """`ones`: integers that the launcher makes constants because they are 1, and "bias" where there
    is none.
    """
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constexprs = {argument: None if argument == "bias" else 1 for argument in ones} | tile
    signature = {}
    for argument in kernel.arg_names:
        pointer = argument in ("x", "first", "second", "factor", "bias", "y", "g", "out")
        usual = (
            f"*{kind}" if pointer else "i32" if argument in ("rows", "rank", "inner") else "i32:16"
        )
        signature[argument] = "constexpr" if argument in constexprs else usual
    return dict(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        forward=forward,
        dots=True,
    )
