"""Linear attention on Triton, forward and backward: what is computed in which order.
`triton_launches` has the launches.

A pass is: the highest exponents (FAVOR+ only), each chunk's sums, a scan over the chunks, and the
output of each chunk. Sums are made again in the backward pass, which then goes through the chunks
from the end. A few queries over a state are one launch instead, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv, power_of_two
from ..rows import dense_rows
from . import tiles
from .features import normalized
from .triton_launches import Pass, Spec, constants, launch, strides

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_QUERIES, MOST_KEYS = 32, 64  # of the decode kernel


def attention(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    *,
    directions: Tensor | None,
    mask: Tensor | None,
    decay: Tensor | None,
    normalize: bool,
    causal: bool,
    factors: tuple[float, float],
    gain: float,
    memory: tuple[Tensor, Tensor | None, Tensor | None] | None,
    keep: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`effattn.kernels.linear.attention` and `fold` (q None): out, and with `keep` the memory's
    sums, norms and top.

    fp16, bf16 or fp32, up to 256 wide; ValueError otherwise.
    """
    if k.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {k.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    tiles.tile("forward", "interpreted", max(k.shape[3], v.shape[3]))
    if feature_map == "softmax":  # over all columns, while the kernels go through some at a time
        if k.dtype == torch.float16:  # a feature's gradient is as large as the feature is small
            q, k, v = (None if x is None else x.float() for x in (q, k, v))
        q, k = (None if x is None else normalized(x) for x in (q, k))
        feature_map = "identity"
    features = k.shape[3] if directions is None else directions.shape[0]
    spec = Spec(feature_map, factors, normalize, causal, gain, keep, features)
    q, k, v, mask = map(dense_rows, (q, k, v, mask))
    rate = None if decay is None else decay.float().log2().contiguous()
    w_q = w_k = None
    if directions is not None:  # the factors go to them, which are few
        # a rounded direction moves the kinks of favor_relu, and gradients with them: these stay in
        # fp32
        dtype = torch.float32 if feature_map == "favor_relu" else k.dtype
        w_q, w_k = ((directions.float() * factor).to(dtype).contiguous() for factor in factors)
    sums, norms, top = memory or (None, None, None)
    queries, keys = 0 if q is None else q.shape[2], k.shape[2]
    learning = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, sums)
    )
    if causal and 0 < queries <= MOST_QUERIES and keys <= MOST_KEYS and not (keep or learning):
        return _decode(q, k, v, sums, norms, top, w_q, w_k, mask, rate, spec), None, None, None
    if causal and 0 < queries < keys:  # keys that all queries see
        past = keys - queries
        old = None if mask is None else mask[:, :past]
        _, sums, norms, top = _Attention.apply(
            None,
            k[:, :, :past],
            v[:, :, :past],
            sums,
            norms,
            top,
            w_q,
            w_k,
            old,
            rate,
            spec._replace(keep=True),
        )
        k, v, mask = k[:, :, past:], v[:, :, past:], None if mask is None else mask[:, past:]
    return _Attention.apply(q, k, v, sums, norms, top, w_q, w_k, mask, rate, spec)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sums, norms, top, w_q, w_k, mask, rate, spec):
        call = Pass(q, k, v, w_q, w_k, mask, rate, spec, top)
        with torch.cuda.device_of(k):
            weights = call.weights("chunk_sums")
            states, zs, last, last_z = call.states(
                weights, sums, norms, keep=spec.keep or not spec.causal
            )
            out = share = None
            if q is not None:
                out, share = call.outputs(weights, states, zs, last, last_z)
        ctx.call = call
        ctx.save_for_backward(q, k, v, sums, norms, top, w_q, w_k, mask, rate, out, share)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        if not spec.keep:
            return out, None, None, None
        final = None
        if weights.ends is not None:
            final = weights.ends[..., -1].contiguous()
            ctx.mark_non_differentiable(final)
        return out, last, last_z, final

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad, grad_sums, grad_norms, _):
        q, k, v, sums, norms, top, w_q, w_k, mask, rate, out, share = ctx.saved_tensors
        call = Pass(q, k, v, w_q, w_k, mask, rate, ctx.spec, top)
        if q is not None:
            grad = torch.zeros_like(out) if grad is None else dense_rows(grad)
        with torch.cuda.device_of(k):
            dq, dk, dv, d_sums, d_norms = call.backward(
                sums, norms, out, share, grad, grad_sums, grad_norms
            )
        d_sums, d_norms = (None if x is None else d for x, d in ((sums, d_sums), (norms, d_norms)))
        return dq, dk, dv, d_sums, d_norms, None, None, None, None, None, None


def _decode(q, k, v, sums, norms, top, w_q, w_k, mask, rate, spec: Spec) -> Tensor:
    """Up to 32 queries and 64 keys after a state."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    fixed = constants("decode", tiles.architecture(q.device), spec, dim, value_dim)
    fixed["M"] = min(64, max(16, power_of_two(heads // kv_heads * queries)))
    out = torch.empty((batch, heads, queries, value_dim), dtype=q.dtype, device=q.device)
    state, norms, top = (None if x is None else x.contiguous() for x in (sums, norms, top))
    rows = heads // kv_heads * queries
    programs = batch * kv_heads * cdiv(rows, fixed["M"]) * cdiv(value_dim, fixed["BLOCK_V"])
    with torch.cuda.device_of(q):
        launch(
            "decode", programs,
            q, k, v, w_q, w_k, mask, top, rate, state, norms, out,
            *strides(q, k, v),
            0 if mask is None else mask.stride(0), spec.factors[1] ** 2 / 2, spec.gain, kv_heads,
            heads // kv_heads, queries, keys,
            NORMALIZE=spec.normalize, N=MOST_KEYS, **fixed,
        )  # fmt: skip
    return out
