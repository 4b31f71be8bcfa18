"""Linear attention on Triton: the launches of a pass, and the compile-time arguments they run with.
`triton_kernels`, `triton_backward` and `triton_decode` have the kernels, `tiles` their sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launching
from ..rounding import cdiv
from . import tiles, triton_backward, triton_decode, triton_kernels
from .features import MAPS

CODES = {"identity": 0, "elu": 1, "relu": 2, "relu2": 3, "favor": 4, "favor_relu": 5}


class Spec(NamedTuple):
    """What a call is about, besides its tensors. `factors`: of q and k before the feature map;
    `gain`: of out.
    """

    feature_map: str
    factors: tuple[float, float]
    normalize: bool
    causal: bool
    gain: float
    keep: bool
    features: int


class Weights(NamedTuple):
    """Of FAVOR+, fp32: highest exponents of q and k, log weights mu, the highest so far, and at the
    chunks' ends.
    """

    top_q: Tensor | None = None
    top_k: Tensor | None = None
    mu: Tensor | None = None
    high: Tensor | None = None
    ends: Tensor | None = None


class Pass:
    """The launches of one call, on aligned queries and keys (or, bidirectional, all of both)."""

    def __init__(self, q, k, v, w_q, w_k, mask, rate, spec: Spec, top: Tensor | None):
        self.q, self.k, self.v, self.w_q, self.w_k, self.mask, self.rate = (
            q,
            k,
            v,
            w_q,
            w_k,
            mask,
            rate,
        )
        self.spec, self.top = spec, top
        self.batch, self.kv_heads, self.keys, self.dim = k.shape
        self.value_dim = v.shape[3]
        self.heads, self.queries = (self.kv_heads, 0) if q is None else q.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.mask_b = 0 if mask is None else mask.stride(0)
        self.arch = tiles.architecture(k.device)

    def fixed(self, kernel: str) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return constants(kernel, self.arch, self.spec, self.dim, self.value_dim)

    def new(self, *shape: int, dtype=torch.float32) -> Tensor:
        """Uninitialised, where k is."""
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def weights(self, kernel: str) -> Weights:
        """FAVOR+'s exponents, nothing for other maps. `kernel`: the one whose chunks count."""
        if not MAPS[self.spec.feature_map].weighs:
            return Weights()
        top_k, mu = (self.new(self.batch, self.kv_heads, self.keys) for _ in range(2))
        self._tops(self.k, self.w_k, self.mask, top_k, mu, self.spec.factors[1] ** 2 / 2)
        top_q = None
        if self.q is not None:
            top_q = self.new(self.batch, self.heads, self.queries)
            self._tops(self.q, self.w_q, None, top_q, None, 0.0)
        first = (
            mu.new_full((self.batch, self.kv_heads), -torch.inf)
            if self.top is None
            else self.top.float()
        )
        high = torch.cummax(mu, dim=-1).values.maximum(first[..., None])
        size = self.fixed(kernel)["C"]
        last = torch.arange(size, self.keys + size, size, device=mu.device).clamp(max=self.keys) - 1
        return Weights(
            top_q, top_k, mu, high, torch.cat([first[..., None], high[..., last]], dim=-1)
        )

    def _tops(self, x, directions, mask, out, mu, half: float) -> None:
        fixed = self.fixed("tops")
        batch, heads, tokens, _ = x.shape
        launch(
            "tops", batch * heads * cdiv(tokens, fixed["C"]),
            x, directions, mask, out, mu,
            *strides(x),
            0 if mask is None else self.mask_b, heads, tokens, half,
            **fixed,
        )  # fmt: skip

    def states(self, weights: Weights, sums, norms, keep: bool):
        """S (B Hkv, n, F, V) and z (B Hkv, n, F) before each chunk, and if `keep` fp32 after
        all.
        """
        fixed = self.fixed("chunk_sums")
        states, zs, rows, chunks = self._buffers(self.keys, fixed["C"])
        launch(
            "chunk_sums", rows * chunks * cdiv(self.spec.features, fixed["BLOCK_F"]),
            self.k, self.v, self.w_k, self.mask, weights.mu, weights.top_k, weights.ends, self.rate,
            states, zs,
            *strides(self.k, self.v),
            self.mask_b, self.kv_heads, self.keys, chunks,
            **fixed,
        )  # fmt: skip
        last, last_z = self.scan(
            states, zs, sums, norms, weights.ends, self.rate, self.keys, fixed["C"], keep
        )
        return states, zs, last, last_z

    def _buffers(self, tokens: int, size: int) -> tuple[Tensor, Tensor | None, int, int]:
        rows, chunks = self.batch * self.kv_heads, cdiv(tokens, size)
        wide = torch.float32 if self.k.dtype == torch.float32 else torch.bfloat16
        states = self.new(rows, chunks, self.spec.features, self.value_dim, dtype=wide)
        return (
            states,
            self.new(rows, chunks, self.spec.features) if self.spec.normalize else None,
            rows,
            chunks,
        )

    def scan(
        self,
        states,
        zs,
        sums,
        norms,
        ends,
        rate,
        tokens: int,
        size: int,
        keep: bool,
        reverse: bool = False,
    ):
        """Over the chunks, in place; the totals after the last one, (B, Hkv, F, V) and (B, Hkv,
        F).
        """
        shape = (self.batch, self.kv_heads, self.spec.features)
        found = []
        for own, first, last_shape in (
            (states, sums, (*shape, self.value_dim)),
            (zs, norms, shape),
        ):
            last = self.new(*last_shape) if keep and own is not None else None
            found.append(last)
            if own is None:
                continue
            elements = own[0, 0].numel()
            first = None if first is None else first.float().contiguous()
            launch(
                "scan", own.shape[0] * cdiv(elements, tiles.SCAN),
                own, first, last, ends, rate, self.kv_heads, tokens, own.shape[1], elements,
                C=size, REVERSE=reverse, BLOCK=tiles.SCAN, num_warps=4, num_stages=2,
            )  # fmt: skip
        return found

    def common(self, last: Tensor, last_z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The one state that all see without causality, as the kernels read states."""
        wide = torch.float32 if self.k.dtype == torch.float32 else torch.bfloat16
        return last.to(wide), last_z

    def outputs(self, weights: Weights, states, zs, last, last_z) -> tuple[Tensor, Tensor | None]:
        """out (B, Hq, Tq, V), and 1 / normaliser (B, Hq, Tq) fp32 where there is one."""
        fixed = self.fixed("forward") | {"CAUSAL": self.spec.causal}
        chunks = states.shape[1]
        if not self.spec.causal:
            (states, zs), chunks = self.common(last, last_z), 1
        out = _like(self.q, self.value_dim)
        share = self.new(*self.q.shape[:3]) if self.spec.normalize else None
        launch(
            "forward", self.batch * self.heads * cdiv(self.queries, fixed["C"]),
            self.q, self.k, self.v, self.w_q, self.w_k, self.mask, weights.mu, weights.high,
            weights.top_k, weights.top_q, weights.ends, self.rate, states, zs, out, share,
            *strides(self.q, self.k, self.v, out),
            self.mask_b, self.spec.gain, self.heads, self.group, self.queries, chunks,
            **fixed,
        )  # fmt: skip
        return out, share

    def backward(self, sums, norms, out, share, grad, grad_sums, grad_norms):
        """dq (None without queries), dk, dv, and the gradients of the sums that were given.

        The queries' gradient reads the sums before each chunk; keys and values read the sums of
        gradients after it, which are made from the last chunk to the first.
        """
        spec, causal = self.spec, self.spec.causal
        weights = self.weights("backward_keys")
        fixed = self.fixed("gradient_sums")
        size = fixed["C"]
        slope = dq = None
        if self.q is not None:
            slope, dq = self._slopes(out, grad) if spec.normalize else None, _like(self.q, self.dim)
            states, zs, last, last_z = self.states(weights, sums, norms, keep=not causal)
            if not causal:
                states, zs = self.common(last, last_z)
            chunks = states.shape[1] if causal else 1
            launch(
                "backward_queries", self.batch * self.heads * cdiv(self.queries, size),
                self.q, self.k, self.v, grad, self.w_q, self.w_k, self.mask, weights.mu,
                weights.high, weights.top_k, weights.top_q, weights.ends, self.rate, states, zs,
                share, slope, dq,
                *strides(self.q, self.k, self.v, grad, dq),
                self.mask_b, spec.gain, self.heads, self.group, self.queries, chunks,
                CAUSAL=causal, **self.fixed("backward_queries"),
            )  # fmt: skip
        tokens = self.keys if self.q is None or causal else self.queries
        states, zs, rows, chunks = self._buffers(tokens, size)
        if self.q is None:
            states.zero_()
            if zs is not None:
                zs.zero_()
        else:
            launch(
                "gradient_sums", rows * chunks * cdiv(spec.features, fixed["BLOCK_F"]),
                self.q, grad, self.w_q, weights.high, weights.top_q, weights.ends, self.rate, share,
                slope, states, zs,
                *strides(self.q, grad),
                spec.gain, self.kv_heads, self.group, tokens, chunks,
                CAUSAL=causal, **fixed,
            )  # fmt: skip
        ends = weights.ends
        d_sums, d_norms = self.scan(
            states,
            zs,
            grad_sums,
            grad_norms,
            ends if causal else None,
            self.rate,
            tokens,
            size,
            keep=True,
            reverse=True,
        )
        if not causal:
            (states, zs), chunks = self.common(d_sums, d_norms), 1
            ends = None if ends is None else torch.stack((ends[..., 0], ends[..., -1]), dim=-1)
        dk, dv = self._key_gradients(weights, ends, states, zs, chunks, share, slope, grad)
        return dq, dk, dv, d_sums, d_norms

    def _key_gradients(self, weights: Weights, ends, states, zs, chunks: int, share, slope, grad):
        """dk and dv: each query head's part, and then the groups' sums."""
        fixed = self.fixed("backward_keys") | {
            "CAUSAL": self.spec.causal,
            "INSIDE": self.spec.causal and self.queries > 0,
        }
        if self.group == 1:
            dk, dv = _like(self.k, self.dim), _like(self.v, self.value_dim)
        else:
            dk, dv = (
                self.new(self.batch, self.heads, self.keys, d) for d in (self.dim, self.value_dim)
            )
        launch(
            "backward_keys", self.batch * self.heads * cdiv(self.keys, fixed["C"]),
            self.q, self.k, self.v, grad, self.w_q, self.w_k, self.mask, weights.mu, weights.high,
            weights.top_k, weights.top_q, ends, self.rate, states, zs, share, slope, dk, dv,
            *strides(self.q, self.k, self.v, grad, dk, dv),
            self.mask_b, self.spec.factors[1] ** 2, self.spec.gain, self.heads, self.group,
            self.keys, chunks,
            **fixed,
        )  # fmt: skip
        if self.group == 1:
            return dk, dv
        return tuple(x.unflatten(1, (-1, self.group)).sum(dim=2).to(self.k.dtype) for x in (dk, dv))

    def _slopes(self, out: Tensor, grad: Tensor) -> Tensor:
        slope = self.new(*out.shape[:3])
        launch(
            "slopes", self.batch * self.heads * cdiv(self.queries, tiles.ROWS),
            out, grad, slope,
            *strides(out, grad),
            self.heads, self.queries,
            V=self.value_dim, C=tiles.ROWS, BLOCK_V=tiles.padded(self.value_dim), num_warps=4,
            num_stages=1,
        )  # fmt: skip
        return slope


def constants(kernel: str, arch: str, spec: Spec, dim: int, value_dim: int) -> dict[str, Any]:
    """The compile-time arguments of a launch, num_warps and num_stages among them."""
    d, v = tiles.padded(dim), tiles.padded(value_dim)
    directed = MAPS[spec.feature_map].directed
    size = "both_ways" if kernel == "forward" and not spec.causal else kernel
    tile = tiles.tile(size, arch, max(d, v), directed)
    block = min(tile.f, tiles.padded(spec.features))
    fixed = dict(F=spec.features, D=dim, BLOCK_F=block, BLOCK_D=d, **tile.options)
    if kernel == "decode":
        return fixed | dict(MAP=CODES[spec.feature_map], V=value_dim, BLOCK_V=min(v, 32))
    if kernel == "tops":
        return fixed | dict(C=tile.c)
    return fixed | dict(MAP=CODES[spec.feature_map], V=value_dim, C=tile.c, BLOCK_V=v)


def jitted(kernel: str) -> Any:
    """A kernel by its name."""
    modules = (triton_kernels, triton_backward, triton_decode)
    return next(getattr(each, kernel) for each in modules if hasattr(each, kernel))


def _like(x: Tensor, dim: int) -> Tensor:
    """Uninitialised, x's shape but for the last size; tokens lie outside of heads if they do in
    x.
    """
    batch, heads, length, _ = x.shape
    if x.stride(2) > x.stride(1):
        return torch.empty((batch, length, heads, dim), dtype=x.dtype, device=x.device).transpose(
            1, 2
        )
    return torch.empty((batch, heads, length, dim), dtype=x.dtype, device=x.device)


def strides(*tensors: Tensor | None) -> list[int]:
    """The outer strides of (B, H, T, D), in elements, of one tensor after the other."""
    return [step for x in tensors for step in ((0, 0, 0) if x is None else x.stride()[:3])]


def launch(kernel: str, programs: int, *arguments, **fixed) -> None:
    """Runs a kernel by its name, so many programs."""
    if programs:  # a grid of none is an error
        # multiply-adds may fuse, as was every Triton's default before 3.10
        launching.launch(
            jitted(kernel), (programs, 1, 1), arguments, {**fixed, "enable_fp_fusion": True}
        )
