"""Codebook attention on Triton: tiles, launches and the backward passes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..flash import tiles
from ..flash import triton_backward as flash_kernels
from ..flash.triton_impl import DTYPES
from ..flash.triton_pieces import LOG2E
from ..once import once_differentiable
from ..precision import as_given
from ..rounding import cdiv
from ..rows import dense_rows
from . import triton_kernels


@lru_cache
def tile(kernel: str, width: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """Tile sizes and launch options of a kernel, for padded head sizes of at most `width`."""
    if width > tiles.WIDEST:
        raise ValueError(f"head size: got {width}, valid are 1 to {tiles.WIDEST}")
    if arch == "interpreted":
        return dict(BLOCK_M=32, BLOCK_W=16, num_warps=1, num_stages=1)
    if dtype == torch.float32:
        return dict(
            BLOCK_M=32 if width <= 128 else 16,
            BLOCK_W=32 if width <= 128 else 16,
            num_warps=4,
            num_stages=1,
        )
    sizes = {
        64: (64, 32 if arch == "sm_100" and kernel == "forward" else 64),
        128: (64, 32),
        256: (32, 32),
    }
    block_m, block_w = sizes[min(size for size in sizes if width <= size)]
    if kernel in ("summarise", "sum_gradient"):
        block_m, block_w = block_w, block_m
    return dict(
        BLOCK_M=block_m, BLOCK_W=block_w, num_warps=4, num_stages=1 if arch == "gfx942" else 2
    )


def _tile(kernel: str, x: Tensor, *dims: int) -> dict[str, int]:
    return tile(kernel, max(map(tiles.padded, dims)), x.dtype, tiles.architecture(x.device))


def _check(x: Tensor) -> Tensor:
    """x with its last dimension dense; ValueError for dtypes that the kernels do not have."""
    if x.dtype not in DTYPES:
        raise ValueError(
            f"dtype: got {x.dtype}, valid for impl='triton' are {', '.join(map(str, DTYPES))}"
        )
    return dense_rows(x)


def nearest(k: Tensor, codebook: Tensor) -> Tensor:
    """As `effattn.kernels.vq.nearest`."""
    k, codebook = _check(k), codebook.float()
    (batch, heads, tokens, dim), count = k.shape, codebook.shape[1]
    words = _parts(codebook, k.dtype)
    sizes = _tile("nearest", k, dim)
    codes = torch.empty((batch, heads, tokens), dtype=torch.int64, device=k.device)
    with torch.cuda.device_of(k):
        triton_kernels.nearest[(batch * heads * cdiv(tokens, sizes["BLOCK_M"]),)](
            k, words, codebook.square().sum(-1) / 2, codes, *k.stride()[:3], heads, tokens, count,
            len(words),
            D=dim, BLOCK_D=tiles.padded(dim), **sizes,
        )  # fmt: skip
    return codes


def _parts(codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, H, S, D) in `dtype`, whose sum is the codebook to float32's precision: 1, or 3 in
    half precision.
    """
    if dtype == torch.float32:
        return codebook[None].contiguous()
    found = []
    for _ in range(3):
        found.append(codebook.to(dtype))
        codebook = codebook - found[-1].float()
    return torch.stack(found)


def summarise(
    v: Tensor, codes: Tensor, words: int, real: Tensor | None, size: int, first: int
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.vq.summarise`."""
    return _Summarise.apply(_check(v), codes.contiguous(), words, dense_rows(real), size, first)


class _Summarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, codes, words, real, size, first):
        batch, heads, tokens, dim = v.shape
        blocks = (first + tokens - 1) // size - first // size + 1
        sums = torch.empty((batch, heads, blocks, words, dim), dtype=torch.float32, device=v.device)
        counts = torch.empty((batch, heads, blocks, words), dtype=torch.int32, device=v.device)
        sizes = _tile("summarise", v, dim)
        with torch.cuda.device_of(v):
            triton_kernels.summarise[(batch * heads * blocks * cdiv(words,
            sizes["BLOCK_W"]),)](
                v, codes, real, sums, counts, *v.stride()[:3], 0 if real is None else
                real.stride(0), heads, tokens,
                first, size, blocks, words, V=dim, BLOCK_V=tiles.padded(dim), **sizes,
            )  # fmt: skip
        ctx.save_for_backward(codes, real)
        ctx.numbers = size, first, v.dtype
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad, _):
        codes, real = ctx.saved_tensors
        size, first, dtype = ctx.numbers
        words, dim = grad.shape[3:]
        block = (
            torch.arange(first, first + codes.shape[2], device=codes.device) // size - first // size
        )
        at = (block * words + codes)[..., None].expand(-1, -1, -1, dim)
        dv = grad.flatten(2, 3).gather(2, at).to(dtype)  # each token's is that of its code
        return (
            dv if real is None else torch.where(real[:, None, :, None], dv, 0.0),
            None,
            None,
            None,
            None,
            None,
        )


def read(
    q: Tensor, codebook: Tensor, sums: Tensor, counts: Tensor, scale: float, size: int, first: int
) -> tuple[Tensor, Tensor]:
    """As `effattn.kernels.vq.read`."""
    q = _check(q)
    return _Read.apply(
        q,
        codebook.to(q.dtype).contiguous(),
        sums.contiguous(),
        counts.contiguous(),
        scale,
        size,
        first,
    )


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, words, sums, counts, scale, size, first):
        (batch, heads, tokens, dim), value_dim = q.shape, sums.shape[-1]
        out = torch.empty((batch, heads, tokens, value_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
        sizes, numbers = _tile("forward", q, dim, value_dim), _numbers(q, words, sums, size, first)
        along = cdiv(min(size, tokens), sizes["BLOCK_M"])
        with torch.cuda.device_of(q):
            triton_kernels.forward[(batch * heads * sums.shape[2] * along,)](
                q, words, sums, counts, out, lse, *q.stride()[:3], scale * LOG2E.value, *numbers,
                along, words.shape[1],
                **_widths(dim, value_dim), **sizes,
            )  # fmt: skip
        ctx.save_for_backward(q, words, sums, counts, out, lse)
        ctx.numbers = scale, size, first
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    @as_given
    def backward(ctx, grad, grad_lse):
        if grad is None and grad_lse is None:
            return (None,) * 7
        q, words, sums, counts, out, lse = ctx.saved_tensors
        scale, size, first = ctx.numbers
        (batch, heads, tokens, dim), value_dim = q.shape, sums.shape[-1]
        grad = torch.zeros_like(out) if grad is None else _check(grad)
        delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
        numbers, widths, rows = (
            _numbers(q, words, sums, size, first),
            _widths(dim, value_dim),
            tiles.ROWS,
        )
        tensors, steps = (q, words, sums, counts, grad, lse2), (*q.stride()[:3], *grad.stride()[:3])
        count, unit = words.shape[1], scale * LOG2E.value
        dq = dsums = None
        with torch.cuda.device_of(q):
            flash_kernels.backward_rows[(batch * heads * cdiv(tokens, rows.m),)](
                out, grad, lse, None if grad_lse is None else grad_lse.contiguous(), delta, lse2,
                *out.stride()[:3], *grad.stride()[:3], heads, tokens,
                V=value_dim, BLOCK_M=rows.m, BLOCK_V=tiles.padded(value_dim), **rows.options,
            )  # fmt: skip
            if ctx.needs_input_grad[0]:
                dq = torch.empty((batch, heads, tokens, dim), dtype=q.dtype, device=q.device)
                sizes = _tile("query_gradient", q, dim, value_dim)
                along = cdiv(min(size, tokens), sizes["BLOCK_M"])
                triton_kernels.query_gradient[(batch * heads * sums.shape[2] * along,)](
                    *tensors, delta, dq, *steps, scale, unit, *numbers, along, count,
                    **widths, **sizes,
                )  # fmt: skip
            if ctx.needs_input_grad[2]:
                dsums = torch.empty_like(sums)
                sizes = _tile("sum_gradient", q, dim, value_dim)
                programs = (
                    sums.shape[0] * sums.shape[1] * sums.shape[2] * cdiv(count, sizes["BLOCK_W"])
                )
                triton_kernels.sum_gradient[(programs,)](
                    *tensors, dsums, *steps, unit, *numbers, count, **widths, **sizes
                )
        return dq, None, dsums, None, None, None, None


def _numbers(q: Tensor, words: Tensor, sums: Tensor, size: int, first: int) -> tuple[int, ...]:
    """heads, group, tokens, first, size, blocks"""
    return q.shape[1], q.shape[1] // len(words), q.shape[2], first, size, sums.shape[2]


def _widths(dim: int, value_dim: int) -> dict[str, int]:
    return dict(D=dim, V=value_dim, BLOCK_D=tiles.padded(dim), BLOCK_V=tiles.padded(value_dim))
