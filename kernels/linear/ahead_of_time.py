"""What ships: the variants of the linear kernels that `effattn.kernels.aot` compiles, as the
launches ask for them.
"""

from __future__ import annotations

from . import tiles
from .triton_impl import MOST_KEYS
from .triton_launches import Spec, constants, jitted

FEATURES = 256  # of the directed variants
_TYPES = dict.fromkeys(
    ("mu", "high", "top", "top_q", "top_k", "ends", "rate", "norms", "share", "slope"), "*fp32"
)
_TYPES |= dict.fromkeys(("heads", "group", "tokens", "chunks", "size", "q_len", "k_len"), "i32")
_TYPES |= dict.fromkeys(("gain", "half", "square"), "fp32")
_WEIGHTS = ("mu", "high", "top", "top_q", "top_k", "ends")
_FORWARD = ("tops", "chunk_sums", "scan", "forward", "decode")


def variants(arch: str) -> list[dict]:
    """Every kernel at head sizes 64 and 128 in bf16 and at 128 in fp16; elu, FAVOR+, decay and both
    directions.
    """
    wanted = [
        (kernel, size, kind, name)
        for kernel in (
            "chunk_sums",
            "forward",
            "decode",
            "gradient_sums",
            "backward_queries",
            "backward_keys",
        )
        for size, kind, name in (
            (64, "bf16", "elu"),
            (128, "bf16", "elu"),
            (64, "bf16", "favor"),
            (128, "bf16", "favor"),
            (128, "fp16", "elu"),
            (128, "bf16", "decay"),
        )
    ]
    wanted += [
        ("forward", 128, "bf16", "both_ways"),
        ("forward", 256, "bf16", "identity"),
        ("chunk_sums", 256, "bf16", "elu"),
        ("decode", 256, "bf16", "elu"),
    ]
    wanted += [("tops", size, "bf16", "favor") for size in (64, 128)]
    found = [variant(arch, kernel, size, kind, name) for kernel, size, kind, name in wanted]
    return [*found, _scan("bf16", False), _scan("bf16", True), _slopes(128, "bf16")]


def variant(arch: str, kernel: str, size: int, kind: str, name: str) -> dict:
    """One kernel for heads of `size`. "decay" and "both_ways" are elu with these; none has a mask
    but "favor".
    """
    directed = name == "favor"
    feature_map = "elu" if name in ("decay", "both_ways") else name
    spec = Spec(
        feature_map,
        (1.0, 1.0),
        True,
        name != "both_ways",
        1.0,
        False,
        FEATURES if directed else size,
    )
    fixed = constants(kernel, arch, spec, size, size)
    options = {"num_warps": fixed.pop("num_warps"), "num_stages": fixed.pop("num_stages")}
    function = jitted(kernel)
    absent = [] if directed else ["mask", "directions", "w_q", "w_k", *_WEIGHTS]
    absent += ["rate"] if name != "decay" else []
    more = dict(CAUSAL=spec.causal, INSIDE=True, NORMALIZE=True, M=16, N=MOST_KEYS)
    fixed |= {x: more[x] for x in more if x in function.arg_names}
    fixed |= {x: None for x in absent if x in function.arg_names}
    wide = {"states": "*bf16", "state": "*fp32"} | ({"out": "*fp32"} if kernel == "tops" else {})
    return dict(
        name=f"{kernel}_{size}_{kind}_{name}",
        kernel=function,
        forward=kernel in _FORWARD,
        dots=True,
        **options,
        **_typed(function, kind, fixed, wide),
    )


def _scan(kind: str, reverse: bool) -> dict:
    fixed = dict(C=64, REVERSE=reverse, BLOCK=tiles.SCAN, rate=None)
    types = {"states": f"*{kind}", "first": "*fp32", "last": "*fp32"}
    return dict(
        name=f"scan_{kind}{'_reverse' if reverse else ''}",
        kernel=jitted("scan"),
        forward=True,
        dots=False,
        num_warps=4,
        num_stages=2,
        **_typed(jitted("scan"), kind, fixed, types),
    )


def _slopes(size: int, kind: str) -> dict:
    fixed = dict(V=size, C=tiles.ROWS, BLOCK_V=tiles.padded(size))
    return dict(
        name=f"slopes_{size}_{kind}",
        kernel=jitted("slopes"),
        forward=False,
        dots=False,
        num_warps=4,
        num_stages=1,
        **_typed(jitted("slopes"), kind, fixed, {}),
    )


def _typed(function, kind: str, fixed: dict, types: dict) -> dict:
    """The signature of `function`: tensors are `kind` unless `types` or _TYPES know better, strides
    multiples of 16.
    """
    signature = {}
    for name in function.arg_names:
        known = "i32:16" if name.endswith(("_b", "_h", "_t")) else f"*{kind}"
        known = {"mask": "*i1", **_TYPES, **types}.get(name, known)
        signature[name] = "constexpr" if name in fixed else known
    return dict(signature=signature, constexprs=fixed)
