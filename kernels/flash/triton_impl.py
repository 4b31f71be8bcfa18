"""Flash attention on Triton, forward and backward: the launches.

`triton_kernels`, `triton_backward` and `triton_backward_keys` have the kernels, `triton_patterns`
what decides which pairs count and how they score, `triton_pieces` how the kernels ask it, `tiles`
their sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launching import launch
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv
from ..rows import dense_rows
from . import tiles
from .dropout import Dropout
from .pattern import Layout, Pattern
from .rules import Bias, Far
from .triton_backward import backward_queries, backward_rows
from .triton_backward_keys import backward_keys
from .triton_bias import BIASES, arguments
from .triton_kernels import forward
from .triton_patterns import PATTERNS, RULES, full_keys
from .triton_pieces import ALL, FARTHER, NEARER

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# ---- launches

KERNELS = {
    "forward": forward, "backward_rows": backward_rows, "backward_queries": backward_queries,
    "backward_keys": backward_keys,
}  # fmt: skip


class Call(NamedTuple):
    """What a call is about, besides its tensors."""

    kind: type[Pattern]
    integers: tuple[int, int, int]
    first: int
    slots: int
    tail: int
    causal: bool
    scale: float
    cap: float
    rule: str | None
    masked: bool
    window: int | None = None  # of far pairs
    bias: str | None = None
    params_step: int = 0  # from one head's parameters of the bias to the next one's
    params: int = 0  # of a head
    drop_step: int = 0  # from one row's numbers of keys to the next one's
    least: int = 0


def constants(
    kernel: str,
    call: Call,
    arch: str,
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    part: int = ALL.value,
) -> dict[str, Any]:
    """The compile-time arguments of a launch, num_warps and num_stages among them."""
    jitted, (rule, slope) = PATTERNS[call.kind], RULES[call.rule]
    d, v = tiles.padded(dim), tiles.padded(value_dim)
    prefix = call.slots > 0 or call.first > 0
    tile = tiles.tile(
        kernel,
        arch,
        max(d, v),
        dtype,
        heavy=prefix or call.masked,
        two_parts=call.window is not None,
    )
    fixed = dict(
        D=dim,
        V=value_dim,
        NEAR=jitted.near,
        RULE=rule,
        BIAS=BIASES[call.bias],
        CAUSAL=call.causal,
        PREFIX=prefix,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        STEP=tile.step,
        BLOCK_D=d,
        BLOCK_V=v,
        **tile.options,
    )
    if kernel != "forward":
        fixed |= {"SLOPE": slope, "PART": part}
    return fixed | (
        {"QUERIES": jitted.queries} if kernel == "backward_keys" else {"KEYS": jitted.keys}
    )


def _like(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, x's shape but for the last size; tokens lie outside of heads if they do in
    x.
    """
    batch, heads, length, _ = x.shape
    options = {"dtype": dtype or x.dtype, "device": x.device}
    if x.stride(2) > x.stride(1):
        return torch.empty((batch, length, heads, dim), **options).transpose(1, 2)
    return torch.empty((batch, heads, length, dim), **options)


def _strides(*tensors: Tensor | None) -> list[int]:
    return [step for x in tensors for step in ((0, 0, 0) if x is None else x.stride()[:3])]


def _launch(kernel: str, programs: int, *arguments, **fixed) -> None:
    if programs:  # a grid of none is an error
        # multiply-adds may fuse, as was every Triton's default before 3.10
        launch(KERNELS[kernel], (programs, 1, 1), arguments, {**fixed, "enable_fp_fusion": True})


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_first, q_far, k_far, mask, start, params, q_drop, k_drop, call):
        batch, heads, queries, dim = q.shape
        out = _like(q, v.shape[-1])
        lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
        fixed = constants("forward", call, tiles.architecture(q.device), q.dtype, dim, v.shape[-1])
        with torch.cuda.device_of(q):
            _launch(
                "forward", batch * heads * cdiv(queries, fixed["BLOCK_M"]),
                q, k, v, q_first, q_far, k_far, mask, start, params, q_drop, k_drop, out, lse,
                *_strides(q, k, v, q_first, q_far, k_far, out),
                *_numbers(q, k, mask, call),
                **fixed,
            )  # fmt: skip
        more = (mask, start, params, q_drop, k_drop)
        ctx.save_for_backward(q, k, v, q_first, q_far, k_far, *more, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad, grad_lse):
        if grad is None and grad_lse is None:
            return (None,) * 12
        q, k, v, q_first, q_far, k_far, *more, out, lse = ctx.saved_tensors
        batch, heads, queries, value_dim = out.shape
        needs_q, needs_k, needs_v, needs_first, needs_q_far, needs_k_far, *_ = ctx.needs_input_grad
        grad = torch.zeros_like(out) if grad is None else dense_rows(grad)
        delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
        rows = tiles.ROWS
        more = (*more, grad, lse2, delta)
        dq = dk = dv = dq_first = dq_far = dk_far = None
        with torch.cuda.device_of(q):
            _launch(
                "backward_rows", batch * heads * cdiv(queries, rows.m),
                out, grad, lse, None if grad_lse is None else grad_lse.contiguous(), delta, lse2,
                *_strides(out, grad),
                heads, queries,
                V=value_dim, BLOCK_M=rows.m, BLOCK_V=tiles.padded(value_dim), **rows.options,
            )  # fmt: skip
            part = ALL.value if q_far is None else NEARER.value
            if needs_q or needs_first:
                dq, dq_first = _query_gradients(ctx.call, part, q, k, v, q_first, *more)
            if needs_k or needs_v:
                sums = v.dtype if q_far is None else torch.float32
                dk, dv = _key_gradients(ctx.call, part, q, k, v, q_first, *more, None, sums)
            if needs_q_far:
                dq_far, _ = _query_gradients(ctx.call, FARTHER.value, q_far, k_far, v, None, *more)
            if q_far is not None and (needs_k_far or needs_v):
                dk_far, dv = _key_gradients(
                    ctx.call, FARTHER.value, q_far, k_far, v, None, *more, dv, v.dtype
                )
        return dq, dk, dv, dq_first, dq_far, dk_far, *(None,) * 6


def _query_gradients(
    call: Call, part: int, q, k, v, q_first, *more: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dq and dq_first of a part of the pairs. more: mask, start, params, q_drop, k_drop, grad,
    lse2, delta.
    """
    batch, heads, queries, dim = q.shape
    dq, dq_first = _like(q, dim), None if q_first is None else _like(q, dim)
    fixed = constants(
        "backward_queries", call, tiles.architecture(q.device), q.dtype, dim, v.shape[3], part
    )
    _launch(
        "backward_queries", batch * heads * cdiv(queries, fixed["BLOCK_M"]),
        q, k, v, q_first, *more, dq, dq_first,
        *_strides(q, k, v, q_first, more[5], dq),
        *_numbers(q, k, more[0], call),
        **fixed,
    )  # fmt: skip
    return dq, dq_first


def _key_gradients(
    call: Call,
    part: int,
    q,
    k,
    v,
    q_first,
    mask,
    start,
    params,
    q_drop,
    k_drop,
    grad,
    lse2,
    delta,
    dv_near,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dk and dv, dv in `dtype`, of a part of the pairs; dv_near, from the other part, is added to
    dv.
    """
    batch, kv_heads, keys, value_dim = v.shape
    dk, dv = _like(k, k.shape[3]), _like(v, value_dim, dtype)
    fixed = constants(
        "backward_keys", call, tiles.architecture(q.device), q.dtype, k.shape[3], value_dim, part
    )
    _launch(
        "backward_keys", batch * kv_heads * cdiv(keys, fixed["BLOCK_N"]),
        q, k, v, q_first, mask, start, params, q_drop, k_drop, grad, lse2, delta, dk, dv, dv_near,
        *_strides(q, k, v, q_first, grad, dk, dv),
        *_numbers(q, k, mask, call),
        **fixed,
    )  # fmt: skip
    return dk, dv


def _numbers(q: Tensor, k: Tensor, mask: Tensor | None, call: Call) -> tuple[float, ...]:
    """What the kernels over pairs take behind the strides of the other tensors, in their order."""
    return (
        0 if mask is None else mask.stride(0),
        call.drop_step,
        call.least,
        call.scale,
        call.cap,
        call.params_step,
        call.params,
        q.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        k.shape[2],
        call.slots,
        call.tail,
        call.first,
        call.window or 0,
        *call.integers,
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    layout: Layout,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    q_first: Tensor | None,
    need_lse: bool,
    far: Far | None = None,
    bias: Bias | None = None,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `effattn.kernels.flash.attention`; (out, lse or None). fp16, bf16 or fp32, heads up to 256
    wide.

    ValueError for what the kernels do not have: other dtypes, wider heads, rings, patterns without
    a jitted twin, gradients of biases."""
    if q.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {q.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    if type(pattern) not in PATTERNS:
        names = ", ".join(kind.__name__ for kind in PATTERNS)
        raise ValueError(
            f"pattern: got {type(pattern).__name__}, valid for impl='triton' are {names}"
        )
    if layout.ring is not None or layout.slots_at is not None:
        raise ValueError(
            "layout: rings and slots_at are for the decode kernels; here keys lie in their order"
        )
    if layout.tokens(k.shape[2]) != layout.tail + k.shape[2] - layout.slots:
        raise ValueError(
            f"layout.total: got {layout.total}, without a ring only tail + Tk - slots is valid"
        )
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(
            f"scale and softcap: got {scale} and {softcap}, valid are positive numbers"
        )
    bounded = PATTERNS[type(pattern)].keys is not full_keys
    # a full pattern shows them anyway
    first = pattern.first if bounded or q_first is not None else 0
    params, params_step, numbers = arguments(bias)
    call = Call(
        kind=type(pattern),
        integers=PATTERNS[type(pattern)].integers(pattern),
        first=first,
        slots=layout.slots,
        tail=layout.tail,
        causal=causal,
        scale=float(scale),
        cap=float(softcap or 0.0),
        rule=None if softcap is None else "softcap",
        masked=layout.mask is not None,
        window=far and far.window,
        bias=bias and bias.kind,
        params_step=params_step,
        params=numbers,
        drop_step=0 if drop is None or len(drop.k) == 1 else k.shape[2],
        least=0 if drop is None else drop.least,
    )
    mask, start = layout.mask, layout.start
    if mask is not None:
        mask = dense_rows(mask.expand(q.shape[0], -1))
    if start is not None:
        start = start.expand(q.shape[0]).contiguous()
    tensors = (q, k, v, q_first if first else None, far and far.q, far and far.k)
    numbers_of = (None, None) if drop is None else (drop.q.contiguous(), drop.k.contiguous())
    out, lse = _Attention.apply(*map(dense_rows, tensors), mask, start, params, *numbers_of, call)
    return out, lse if need_lse else None
