"""What the flash kernels ship, for `effattn.kernels.aot`: one variant for each kind of machine code
that a launch asks for, built from the same tables as the launches."""

from __future__ import annotations

from itertools import product

import torch

from . import tiles
from .pattern import Blocks, Pattern, Window
from .triton_impl import KERNELS, Call, constants
from .triton_pieces import ALL, FARTHER, NEARER

_DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16}
_TYPES = (
    dict.fromkeys(("lse", "lse2", "delta", "grad_lse"), "*fp32")
    | dict.fromkeys(
        ("heads", "group", "q_len", "k_len", "slots", "tail", "first", "window", "a", "b", "c"),
        "i32",
    )
    | dict.fromkeys(("drop_b", "least"), "i32")
    | dict.fromkeys(("q_drop", "k_drop"), "*i32")
    | dict.fromkeys(("step", "n_params"), "i32")
    | {
        "mask": "*i1",
        "start": "*i64",
        "scale": "fp32",
        "cap": "fp32",
        "params_ptr": "*fp32",
        "dv_near": "*fp32",
    }
)


def variants(arch: str) -> list[dict]:
    """Forward and backward at head sizes 64 and 128 in bf16, and each of the other choices once or
    twice.
    """
    plain = dict(first=0, slots=0, tail=0, causal=True, scale=0.1, cap=0.0, rule=None, masked=False)
    full, window = Call(Pattern, (0, 0, 0), **plain), Call(Window, (512, 1, 0), **plain)
    blocks, padded = Call(Blocks, (64, 1, 32), **plain), full._replace(masked=True)
    # and q_first
    every = window._replace(first=4, slots=4, tail=96, cap=50.0, rule="softcap", masked=True)
    kernels = ("forward", "backward_queries", "backward_keys")
    wanted = [(kernel, size, "*bf16", full, "full") for kernel in kernels for size in (64, 128)]
    wanted += [(kernel, 128, "*bf16", window, "window") for kernel in kernels]
    wanted += [(kernel, 128, "*bf16", every, "every_option") for kernel in kernels]
    wanted += [(kernel, 128, "*fp16", full, "full") for kernel in kernels]
    wanted += [
        ("forward", 64, "*bf16", window, "window"),
        ("forward", 64, "*bf16", every, "every_option"),
        ("forward", 128, "*bf16", padded, "padded"),
        ("forward", 128, "*bf16", blocks, "blocks"),
        ("forward", 128, "*bf16", full._replace(causal=False), "both_ways"),
        ("forward", 256, "*bf16", full, "full"),
    ]
    found = [
        variant(arch, kernel, size, kind, call, name) for kernel, size, kind, call, name in wanted
    ]
    far, alibi = full._replace(window=512), full._replace(bias="alibi", params_step=1, params=1)
    for size in (64, 128):
        found.append(variant(arch, "forward", size, "*bf16", far, "far"))
        for kernel, part in product(("backward_queries", "backward_keys"), (NEARER, FARTHER)):
            name = "near_part" if part is NEARER else "far_part"
            found.append(variant(arch, kernel, size, "*bf16", far, name, part.value))
    dropped = full._replace(least=1 << 20)
    for kernel in kernels:
        found.append(variant(arch, kernel, 128, "*bf16", alibi, "alibi"))
        found.append(variant(arch, kernel, 128, "*bf16", dropped, "dropout"))
    return [*found, _rows(128, "*bf16")]


def variant(
    arch: str, kernel: str, size: int, kind: str, call: Call, name: str, part: int = ALL.value
) -> dict:
    """One kernel for heads of `size` and pointers to `kind`; with a prefix come q_first, with a
    mask start too.
    """
    fixed = constants(kernel, call, arch, _DTYPES[kind], size, size, part)
    options = {"num_warps": fixed.pop("num_warps"), "num_stages": fixed.pop("num_stages")}
    jitted = KERNELS[kernel]
    absent = {
        ("q_first", "dq_first"): not fixed["PREFIX"] or call.window,
        ("mask", "start"): not call.masked,
        ("q_far", "k_far"): not call.window,
        ("params_ptr",): not call.bias,
        ("q_drop", "k_drop"): not call.least,
        ("dv_near",): part != FARTHER.value,
    }
    absent = [name for names, is_absent in absent.items() if is_absent for name in names]
    return dict(
        name=f"{kernel}_{size}_{kind[1:]}_{name}",
        kernel=jitted,
        forward=kernel == "forward",
        dots=True,
        loop=-1,
        **options,
        **_typed(jitted, kind, fixed | {x: None for x in absent if x in jitted.arg_names}),
    )


def _rows(size: int, kind: str) -> dict:
    jitted = KERNELS["backward_rows"]
    fixed = dict(V=size, BLOCK_M=tiles.ROWS.m, BLOCK_V=tiles.padded(size), grad_lse=None)
    return dict(
        name=f"backward_rows_{size}_{kind[1:]}",
        kernel=jitted,
        forward=False,
        dots=False,
        num_warps=tiles.ROWS.warps,
        num_stages=tiles.ROWS.stages,
        **_typed(jitted, kind, fixed),
    )


def _typed(jitted, kind: str, fixed: dict) -> dict:
    """The signature of `jitted`: tensors are `kind` unless _TYPES knows better, strides are
    multiples of 16.
    """
    signature = {}
    for name in jitted.arg_names:
        known = "i32:16" if name.endswith(("_b", "_h", "_t")) else kind
        signature[name] = "constexpr" if name in fixed else _TYPES.get(name, known)
    return dict(signature=signature, constexprs=fixed)
