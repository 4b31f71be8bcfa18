"""Bidirectional linear attention in plain torch, forward and backward: all keys go into one sum, all queries read it.

Two loops over blocks of tokens that stay in the processor's cache. Shapes and names as in `torch_impl`: S sums
phi(k) v and n sums phi(k), a key's weight is w = exp(mu - c), c the highest mu of its head. Queries read S and n as one
matrix: the product with the vector n alone would take as long as the one with S.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .torch_parts import Spec, Sums, joined, output_gradient, scaled, share_of

BUDGET = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements of a block's features


class Call:
    """The call's tensors, its features, and where its blocks lie."""

    def __init__(self, q, k, v, directions, mask, spec: Spec, dtype: torch.dtype):
        self.q, self.k, self.v, self.spec, self.dtype = q.unflatten(1, (k.shape[1], -1)), k, v, spec, dtype
        self.directions = None if directions is None else directions.to(dtype)
        self.mask = None if mask is None else mask[:, None, :, None]
        self.features = k.shape[3] if directions is None else directions.shape[0]

    def blocks(self, heads: int, tokens: int) -> Iterator[slice]:
        row = self.k.shape[0] * heads * max(self.features, self.v.shape[3])
        step = max(1, BUDGET[self.k.device.type] // row)
        return (slice(at, min(at + step, tokens)) for at in range(0, tokens, step))

    def key_blocks(self) -> Iterator[slice]:
        return self.blocks(self.k.shape[1], self.k.shape[2])

    def query_blocks(self) -> Iterator[slice]:
        return self.blocks(self.q.shape[1] * self.q.shape[2], self.q.shape[3])

    def keys(self, block: slice, top: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """x, phi, its weight w, values, and c after the block."""
        real = None if self.mask is None else self.mask[:, :, block]
        x, values = self.k[:, :, block], self.v[:, :, block].to(self.dtype)
        if real is not None:
            x, values = x.masked_fill(~real, 0), values.masked_fill(~real, 0)
        x = scaled(x, self.spec.factors[1], self.dtype)
        phi, mu = self.spec.map.forward(x, self.directions)
        weight = None
        if mu is not None:
            mu = mu[..., None] if real is None else mu[..., None].masked_fill(~real, -torch.inf)
            top = top.maximum(mu.amax(dim=2, keepdim=True))
            weight = ratio(mu, top)
        elif real is not None:
            weight = real.to(self.dtype)
        return x, phi, weight, values, top


def gather(call: Call, memory: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Sums:
    """S, n and c after all keys. memory: those before."""
    values, norms, top = Sums.of(call.k, call.v, call.spec, call.features, call.dtype, memory)
    top = None if top is None else top[..., None, None]
    for block in call.key_blocks():
        _, phi, weight, own, higher = call.keys(block, top)
        phi = phi if weight is None else phi * weight
        if top is not None:
            fade = ratio(top, higher)
            values, norms, top = values * fade, norms * fade[..., 0], higher
        values = values + phi.mT @ own
        norms = None if norms is None else norms + phi.sum(dim=2)
    return Sums(values, norms, None if top is None else top[..., 0, 0])


def read(call: Call, sums: Sums, out: Tensor, share: Tensor | None) -> None:
    """Fills out (B, Hq, Tq, V), and share (B, Hq, Tq), one over the normaliser (0 where that is 0)."""
    table = joined(*sums[:2]).unsqueeze(2)
    out, share = (None if x is None else x.unflatten(1, (call.k.shape[1], -1)) for x in (out, share))
    for block in call.query_blocks():
        x = scaled(call.q[:, :, :, block], call.spec.factors[0], call.dtype)
        y = call.spec.map.forward(x, call.directions)[0] @ table
        if sums.norms is None:
            torch.mul(y, call.spec.gain, out=out[:, :, :, block])
            continue
        part = share_of(y)
        share[:, :, :, block] = part[..., 0]
        torch.mul(y[..., :-1], part, out=out[:, :, :, block])


def backward(call: Call, sums: Sums, top, out, share, grad, d_values, d_norms, dq, dk, dv) -> tuple[Tensor, Tensor]:
    """Fills dq, dk and dv. sums: after all keys; top: c before them, or None; grad: of out; d_values and d_norms: of
    the sums, or None. Returns the gradients of S and n before the keys."""
    heads = call.k.shape[1]
    zero = Sums.of(call.k, call.v, call.spec, call.features, call.dtype)
    given = (z if x is None else x.to(call.dtype) for z, x in zip(zero, (d_values, d_norms), strict=False))
    table, d_table = joined(*sums[:2]).unsqueeze(2), joined(*given)
    out, grad, dq, share = (None if x is None else x.unflatten(1, (heads, -1)) for x in (out, grad, dq, share))
    for block in call.query_blocks():
        x = scaled(call.q[:, :, :, block], call.spec.factors[0], call.dtype)
        phi, _ = call.spec.map.forward(x, call.directions)
        own = grad[:, :, :, block].to(call.dtype)
        if sums.norms is None:
            dy = own * call.spec.gain
        else:
            dy = output_gradient(own, share[:, :, :, block, None], out[:, :, :, block])
        d_table = d_table + (phi.mT @ dy).sum(dim=2)
        d_x = call.spec.map.backward(x, call.directions, phi, dy @ table.mT)
        dq[:, :, :, block] = scaled(d_x, call.spec.factors[0], call.dtype)
    d_values, d_norms = (d_table, None) if sums.norms is None else (d_table[..., :-1], d_table[..., -1])
    d_values = d_values.contiguous()
    highest = None if sums.top is None else sums.top[..., None, None]
    for block in call.key_blocks():
        x, phi, weight, own, _ = call.keys(block, highest)
        d_phi, d_own = own @ d_values.mT, phi @ d_values
        if d_norms is not None:
            d_phi += d_norms[..., None, :]
        if weight is not None:
            d_phi, d_own = d_phi.mul_(weight), d_own.mul_(weight)
        d_x = scaled(call.spec.map.backward(x, call.directions, phi, d_phi), call.spec.factors[1], call.dtype)
        if call.mask is not None:
            d_x, d_own = (y.masked_fill(~call.mask[:, :, block], 0) for y in (d_x, d_own))
        dk[:, :, block], dv[:, :, block] = d_x, d_own
    if top is None:
        return d_values, d_norms
    fade = ratio(top[..., None, None].to(call.dtype), highest)
    return d_values * fade, None if d_norms is None else d_norms * fade[..., 0]


def ratio(low: Tensor, high: Tensor) -> Tensor:
    """exp(low - high), and 0 where both are -inf."""
    return torch.exp((low - high).nan_to_num_(nan=-torch.inf, neginf=-torch.inf))
