"""Bidirectional linear attention in plain torch, forward and backward: all keys go into one sum,
all queries read it.

Two loops over blocks of tokens that stay in the processor's cache. Shapes and names as in
`torch_impl`: S sums phi(k) v and n sums phi(k), a key's weight is w = exp(mu - c), c the highest mu
of its head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..scratch import Room
from .torch_parts import Spec, Sums, scaled, share_of

BUDGET = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements of a block's features


class Call:
    """The call's tensors, its features, and where its blocks lie."""

    def __init__(self, q, k, v, directions, mask, spec: Spec, dtype: torch.dtype):
        self.q, self.k, self.v, self.spec, self.dtype = q, k, v, spec, dtype
        self.directions = None if directions is None else directions.to(dtype)
        self.mask = None if mask is None else mask[:, None, :, None]
        self.features = k.shape[3] if directions is None else directions.shape[0]
        self.room = Room(dtype, k.device)

    def blocks(self, heads: int, tokens: int) -> Iterator[slice]:
        """Stretches of tokens whose temporaries fit in the processor's cache."""
        row = self.k.shape[0] * heads * max(self.features, self.v.shape[3])
        step = max(1, BUDGET[self.k.device.type] // row)
        for at in range(0, tokens, step):
            self.room.clear()
            yield slice(at, min(at + step, tokens))

    def key_blocks(self) -> Iterator[slice]:
        """Of the keys."""
        return self.blocks(self.k.shape[1], self.k.shape[2])

    def query_blocks(self) -> Iterator[slice]:
        """Of the queries."""
        return self.blocks(self.q.shape[1], self.q.shape[2])

    def queries(self, block: slice) -> tuple[Tensor, Tensor]:
        """x (B, Hq, t, D) and phi (B, Hq, t, F)."""
        x = scaled(self.q[:, :, block], self.spec.factors[0], self.dtype)
        return x, self.spec.map.forward(x, self.directions, self.room)[0]

    def by_query_head(self, sums: Sums) -> tuple[Tensor, Tensor | None]:
        """S (B, Hq, F, V) and n (B, Hq, 1, F) as every query head reads them."""
        groups = self.q.shape[1] // self.k.shape[1]
        values, norms = (
            None if x is None else x.repeat_interleave(groups, dim=1) for x in sums[:2]
        )
        return values, None if norms is None else norms.unsqueeze(2)

    def by_key_head(self, x: Tensor, given: Tensor | None) -> Tensor:
        """The transpose of it for gradients: x summed over the groups, and what was given
        besides.
        """
        summed = x.unflatten(1, (self.k.shape[1], -1)).sum(dim=2)
        return summed if given is None else summed + given.to(self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b, (B, H, m, x) and (B, H, x, n), in the block's memory."""
        out = self.room((*a.shape[:3], b.shape[3]))
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
        return out

    def keys(
        self, block: slice, top: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """x, phi, its weight w, values, and c after the block."""
        real = None if self.mask is None else self.mask[:, :, block]
        x, values = self.k[:, :, block], self.v[:, :, block].to(self.dtype)
        if real is not None:
            x, values = x.masked_fill(~real, 0), values.masked_fill(~real, 0)
        x = scaled(x, self.spec.factors[1], self.dtype)
        phi, mu = self.spec.map.forward(x, self.directions, self.room)
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
    values = values.clone(memory_format=torch.contiguous_format)  # a memory's are its owner's
    for block in call.key_blocks():
        _, phi, weight, own, higher = call.keys(block, top)
        phi = phi if weight is None else phi * weight
        if top is not None:
            fade = ratio(top, higher)
            values, norms, top = values * fade, norms * fade[..., 0], higher
        _add_product(values, phi.mT, own)
        norms = None if norms is None else norms + phi.sum(dim=2)
    return Sums(values, norms, None if top is None else top[..., 0, 0])


def read(call: Call, sums: Sums, out: Tensor, share: Tensor | None) -> None:
    """Fills out (B, Hq, Tq, V), and if given share (B, Hq, Tq), one over the normaliser (0 where
    that is 0).
    """
    values, norms = call.by_query_head(sums)
    for block in call.query_blocks():
        _, phi = call.queries(block)
        part = call.spec.gain
        # a row times a matrix: the other way round, or as one more column of S, takes longer
        if norms is not None:
            part = share_of(call.product(norms, phi.mT)).mT
            if share is not None:
                share[:, :, block] = part[..., 0]
        torch.mul(call.product(phi, values), part, out=out[:, :, block])


def backward(
    call: Call, sums: Sums, top, out, share, grad, d_values, d_norms, dq, dk, dv
) -> tuple[Tensor, Tensor]:
    """Fills dq, dk and dv. sums: after all keys; top: c before them, or None; grad: of out;
    d_values and d_norms: of the sums, or None. Returns the gradients of S and n before the keys."""
    values, norms = call.by_query_head(sums)
    own_values, own_norms = (None if x is None else torch.zeros_like(x) for x in (values, norms))
    for block in call.query_blocks():
        x, phi = call.queries(block)
        dy = grad[:, :, block].to(call.dtype)
        dy = torch.mul(
            dy,
            call.spec.gain if norms is None else share[:, :, block, None],
            out=call.room(dy.shape),
        )
        _add_product(own_values, phi.mT, dy)
        d_phi = call.product(dy, values.mT)
        if norms is not None:
            d_total = dy.mul_(out[:, :, block]).sum(dim=-1, keepdim=True).neg_()
            _add_product(own_norms, d_total.mT, phi)
            d_phi.addcmul_(d_total, norms)
        d_x = call.spec.map.backward(x, call.directions, phi, d_phi)
        dq[:, :, block] = scaled(d_x, call.spec.factors[0], call.dtype)
    d_values = call.by_key_head(own_values, d_values)
    d_norms = None if norms is None else call.by_key_head(own_norms[:, :, 0], d_norms)
    highest = None if sums.top is None else sums.top[..., None, None]
    for block in call.key_blocks():
        x, phi, weight, own, _ = call.keys(block, highest)
        d_phi, d_own = call.product(own, d_values.mT), call.product(phi, d_values)
        if d_norms is not None:
            d_phi += d_norms[..., None, :]
        if weight is not None:
            d_phi, d_own = d_phi.mul_(weight), d_own.mul_(weight)
        d_x = scaled(
            call.spec.map.backward(x, call.directions, phi, d_phi), call.spec.factors[1], call.dtype
        )
        if call.mask is not None:
            d_x, d_own = (y.masked_fill(~call.mask[:, :, block], 0) for y in (d_x, d_own))
        dk[:, :, block], dv[:, :, block] = d_x, d_own
    if top is None:
        return d_values, d_norms
    fade = ratio(top[..., None, None].to(call.dtype), highest)
    return d_values * fade, None if d_norms is None else d_norms * fade[..., 0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in place; all (B, H, ., .), total contiguous."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def ratio(low: Tensor, high: Tensor) -> Tensor:
    """exp(low - high), and 0 where both are -inf."""
    return torch.exp((low - high).nan_to_num_(nan=-torch.inf, neginf=-torch.inf))
