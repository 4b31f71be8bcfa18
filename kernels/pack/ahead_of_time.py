"""What ships: packing and unpacking, as the launcher would run them."""

from __future__ import annotations

from .triton_kernels import pack_channels, pack_tokens, unpack_tokens

POINTERS = {"codes_ptr": "*u8", "scale_ptr": "*bf16", "zero_ptr": "*fp16"}


def variants(arch: str) -> list[dict]:
    """int4 with zeros and fp8, at head dimension 128."""
    int4 = dict(BITS=4, IS_FP8=False, HAS_ZERO=True)
    fp8 = dict(BITS=8, IS_FP8=True, HAS_ZERO=False, zero_ptr=None)
    return [
        _variant("pack int4 per channel", pack_channels, PLANES=2, BLOCK_G=64, BLOCK_W=32, **int4),
        _variant("pack int4 per token", pack_tokens, BLOCK_N=32, BLOCK_G=64, **int4),
        _variant("pack fp8 per token", pack_tokens, BLOCK_N=16, BLOCK_G=128, **fp8),
        _variant(
            "unpack int4 per channel",
            unpack_tokens,
            PLANES=2,
            CHANNEL=True,
            BLOCK_N=32,
            BLOCK_W=64,
            **int4,
        ),
    ]


def _variant(name: str, kernel, **constexprs) -> dict:
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, "*bf16")
        else:
            signature[argument] = "i32:16" if argument[1:2] == "_" else "i32"
    return dict(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=4,
        num_stages=3,
        forward=True,
        dots=False,
    )
