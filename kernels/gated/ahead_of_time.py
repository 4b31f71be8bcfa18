"""What the kernel of gated linear attention ships, for `effattn.kernels.aot`: built from the same
tables as the launches."""

from __future__ import annotations

from . import triton_kernels
from .triton_impl import constants

_TYPES = dict.fromkeys(
    ("gate", "beta", "first", "first_norms", "last", "last_norms", "scale"), "*fp32"
) | {"scale": "fp32", "mask": "*i1"}
_TYPES |= dict.fromkeys(("heads", "group", "tokens", "queries"), "i32")


def variants(arch: str) -> list[dict]:
    """One decay a head, one a feature, and the delta rule with both, for heads of 64 and 128 whose
    learned maps have twice as many features."""
    return [
        *(
            _variant(arch, size, "bf16", gate, delta)
            for size in (64, 128)
            for gate in ("head", "feature")
            for delta in (False, True)
        ),
        _variant(arch, 64, "bf16", None, True),
        _variant(arch, 64, "fp16", "head", True),
    ]


def _variant(arch: str, size: int, kind: str, gate: str | None, delta: bool) -> dict:
    function = triton_kernels.forward
    fixed = constants(arch, 2 * size, size, not delta, gate == "feature")
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
    absent = ["mask", *([] if delta else ["beta"]), *([] if gate else ["gate"])]
    absent += ["first_norms", "last_norms"] if delta else []
    fixed |= dict.fromkeys(absent)
    signature = {}
    for name in function.arg_names:
        known = "i32:16" if name.endswith(("_b", "_h", "_t")) else f"*{kind}"
        signature[name] = "constexpr" if name in fixed else _TYPES.get(name, known)
    return dict(
        name=f"forward_{size}_{kind}_{gate or 'no_gate'}{'_delta' if delta else ''}",
        kernel=function,
        signature=signature,
        constexprs=fixed,
        forward=True,
        dots=True,
        **options,
    )
