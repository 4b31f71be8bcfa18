"""Causal linear attention in plain torch: a sweep over blocks of chunks, forward from the first, backward from the end.

Inside a chunk of C tokens pairs are multiplied out; what is before it comes as sums S and n. A block of a few chunks is
one step of a Python loop, sized so that its temporaries stay in the processor's cache. Its chunks' sums are made from
each other by one small triangular matrix (`mix`), which holds the decay and the changes of scale.

    B rows, H key/value heads, G query heads to each, m chunks of C tokens
    (B, H, m, C, .) keys, (B, H, m, G C, .) queries
    w  = decay^(t - j) exp(mu_j - c_t): the pair's weight, c_t the highest mu so far, so that w <= 1; it cancels
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .torch_parts import Spec, Sums, scaled

WHOLE = 64  # up to so many keys are one chunk, whatever the queries are (decoding)
BUDGET = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements of a block's largest temporary


class Block(NamedTuple):
    """Tokens [start, stop) of the keys, and of the queries (None: takes none of them)."""

    keys: tuple[int, int]
    queries: tuple[int, int] | None
    chunks: int = 1


class Weights(NamedTuple):
    """Of one block: pair (.., m, 1, Cq, C), into (.., m, G Cq, 1) of what comes in, after (.., m, C, 1) up to the
    chunk's end, mix (.., m + 1, m + 1), and the highest mu (B, H) at the end. None: ones, or no mu."""

    pair: Tensor | None
    into: Tensor | None
    after: Tensor | None
    mix: Tensor
    top: Tensor | None


def batches(q: Tensor | None, k: Tensor, spec: Spec, directions: Tensor | None) -> list[slice]:
    """Batch rows that go together: one chunk of theirs fits the budget."""
    batch, heads = k.shape[0], k.shape[1] if q is None else q.shape[1]
    widest = max(k.shape[3] if directions is None else directions.shape[0], spec.chunk)
    step = max(1, BUDGET[k.device.type] // (heads * spec.chunk * widest))
    return [slice(b, min(b + step, batch)) for b in range(0, max(batch, 1), step)]


class Call:
    """The sweep over the blocks of some batch rows, in either direction."""

    def __init__(self, q, k, v, directions, mask, decay, spec: Spec, rows: slice, dtype: torch.dtype):
        self.q, self.k, self.v = (None if x is None else x[rows] for x in (q, k, v))
        self.mask = None if mask is None else mask[rows]
        self.directions = None if directions is None else directions.to(dtype)
        self.log_decay = None if decay is None else decay.to(dtype).log()
        self.spec, self.rows, self.dtype = spec, rows, dtype
        self.features = k.shape[3] if directions is None else directions.shape[0]
        self.groups = 1 if q is None else q.shape[1] // k.shape[1]
        self._static: dict[tuple, Weights] = {}

    def start(self, *memory) -> Sums:
        """Of sums, norms and top (whole batches, or None): what is before the first block."""
        some = [None if x is None else x[self.rows] for x in memory]
        return Sums.of(self.k, self.v, self.spec, self.features, self.dtype, some)

    def last(self, sums, norms) -> tuple[Tensor, Tensor | None]:
        """The gradients of S and n at the end, zeros where they are not given."""
        zero = self.start(None, None, None)
        given = (None if x is None else x[self.rows].to(self.dtype) for x in (sums, norms))
        return tuple(z if x is None else x for z, x in zip(zero[:2], given, strict=True))

    def blocks(self) -> Iterator[Block]:
        """In the order of the forward sweep."""
        keys, chunk = self.k.shape[2], self.spec.chunk
        queries = 0 if self.q is None else self.q.shape[2]
        many = max(1, BUDGET[self.k.device.type] // (self.k.shape[0] * self.k.shape[1] * self.groups * chunk
                                                     * max(self.features, chunk)))  # fmt: skip
        first = keys - queries

        def steps(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
            while start < stop:
                chunks = min(many, (stop - start) // chunk)
                end = start + chunks * chunk if chunks else stop
                yield start, end, max(chunks, 1)
                start = end

        if queries and keys <= WHOLE:
            yield Block((0, keys), (0, queries))
        else:
            yield from (Block((a, b), None, n) for a, b, n in steps(0, first))
            yield from (Block((a, b), (a - first, b - first), n) for a, b, n in steps(first, keys))

    # One block's tensors -------------------------------------------------------------------------------------------

    def keys(self, block: Block):
        """x, phi (B, H, m, C, F), mu (B, H, m, C) or None, v (B, H, m, C, V) of the block's keys."""
        tokens = slice(*block.keys)
        x, values = (y[:, :, tokens].unflatten(2, (block.chunks, -1)).contiguous() for y in (self.k, self.v))
        x, values = scaled(x, self.spec.factors[1], self.dtype), values.to(self.dtype)
        real = None
        if self.mask is not None:
            real = self.mask[:, None, tokens].unflatten(2, (block.chunks, -1))[..., None]
            x, values = x.masked_fill(~real, 0), values.masked_fill(~real, 0)
        phi, mu = self.spec.map.forward(x, self.directions)
        if mu is not None and real is not None:
            mu = mu.masked_fill(~real[..., 0], -torch.inf)
        elif real is not None:
            phi = phi * real
        return x, phi, mu, values

    def queries(self, block: Block):
        """x and phi (B, H, m, G C, .) of the block's queries."""
        x = scaled(self.by_chunk(self.q, block), self.spec.factors[0], self.dtype)
        return x, self.spec.map.forward(x, self.directions)[0]

    def by_chunk(self, x: Tensor, block: Block) -> Tensor:
        """(B, H G, T, .) -> the block's (B, H, m, G C, .)."""
        some = x[:, :, slice(*block.queries)]
        some = some.unflatten(2, (block.chunks, -1)).unflatten(1, (self.k.shape[1], self.groups))
        return some.transpose(2, 3).flatten(3, 4).contiguous()

    def put(self, out: Tensor, block: Block, x: Tensor) -> None:
        """The inverse of `by_chunk`, into `out` (whose rows are the whole batch's)."""
        x = x.unflatten(3, (self.groups, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        out[self.rows, :, slice(*block.queries)] = x

    def weights(self, block: Block, mu: Tensor | None, top: Tensor | None) -> Weights:
        chunks, keys = block.chunks, (block.keys[1] - block.keys[0]) // block.chunks
        queries = 0 if block.queries is None else (block.queries[1] - block.queries[0]) // chunks
        shape = (chunks, keys, queries)
        if shape not in self._static:
            self._static[shape] = self._static_weights(*shape)
        weights = self._static[shape]
        return weights if mu is None else self._scaled(weights, mu, top, queries)

    def _static_weights(self, chunks: int, keys: int, queries: int) -> Weights:
        """Causality and decay: the same in every block of this shape."""
        at = torch.arange(keys, device=self.k.device, dtype=self.dtype)
        rows = at[keys - queries :, None]
        pair = (at <= rows).to(self.dtype)
        number = torch.arange(chunks + 1, device=self.k.device, dtype=self.dtype)
        mix = (number <= number[:, None]).to(self.dtype)
        into = after = None
        if self.log_decay is not None:
            log = self.log_decay[:, None, None, None]  # (H, 1, 1, 1)
            pair = pair * torch.exp(log * (rows - at).clamp(min=0))
            into = torch.exp(log * (rows + 1)).repeat(1, 1, self.groups, 1)
            after = torch.exp(log * (keys - 1 - at[:, None]))
            mix = mix * torch.exp(log[:, 0] * keys * (number[:, None] - number).clamp(min=0))
            pair = pair[:, :, None]
        return Weights(pair, into, after, mix, None)

    def _scaled(self, static: Weights, mu: Tensor, top: Tensor, queries: int) -> Weights:
        """With log weights: each row relative to the highest of its own past, so that the future changes no bit."""
        highest = torch.cummax(mu.flatten(2), dim=-1).values.maximum(top[..., None]).view_as(mu)  # c_t
        ends = torch.cat([top[..., None], highest[..., -1]], dim=-1)  # (B, H, m + 1)
        rows = highest[..., highest.shape[-1] - queries :]
        pair = _ratio(mu[:, :, :, None, None, :], rows[:, :, :, None, :, None]).mul_(static.pair)
        into = _ratio(ends[..., :-1, None], rows).repeat(1, 1, 1, self.groups)[..., None]
        after = _ratio(mu, ends[..., 1:, None])[..., None]
        mix = _ratio(ends[..., None, :], ends[..., :, None]) * static.mix
        return Weights(pair, into, after, mix, ends[..., -1])

    def sums(self, phi: Tensor, values: Tensor, before: Sums, weights: Weights) -> tuple[Sums, Sums]:
        """S (B, H, m, F, V) and n (B, H, m, F) before every chunk, and after the last."""
        weighted = phi if weights.after is None else phi * weights.after
        stack = torch.cat([before.values.unsqueeze(2), weighted.mT @ values], dim=2)
        stack = (weights.mix @ stack.flatten(3)).view_as(stack)
        norms = None, None
        if before.norms is not None:
            norms = weights.mix @ torch.cat([before.norms.unsqueeze(2), weighted.sum(dim=-2)], dim=2)
            norms = norms[:, :, :-1], norms[:, :, -1]
        return Sums(stack[:, :, :-1], norms[0], None), Sums(stack[:, :, -1], norms[1], weights.top)

    # The sweeps ----------------------------------------------------------------------------------------------------

    def forward(self, sums: Sums, out: Tensor | None, dens: Tensor | None, keep: bool) -> tuple[Sums, list[Sums]]:
        """Fills `out` and `dens` (one over the normaliser); the sums at the end, those before every block if `keep`."""
        starts = []
        blocks = list(self.blocks())
        for block in blocks:
            if keep:
                starts.append(sums)
            _, phi_k, mu, values = self.keys(block)
            weights = self.weights(block, mu, sums.top)
            before = Sums(*(None if x is None else x.unsqueeze(2) for x in sums))
            if block is not blocks[-1] or block.chunks > 1 or self.spec.keep:
                before, sums = self.sums(phi_k, values, sums, weights)
            if block.queries is None:
                continue
            _, phi_q = self.queries(block)
            y = phi_q @ before.values
            pairs = self.pairs(phi_q @ phi_k.mT, weights)
            if weights.into is not None:
                y.mul_(weights.into)
            y += pairs @ values
            if self.spec.normalize:
                total = phi_q @ before.norms[..., None]
                if weights.into is not None:
                    total.mul_(weights.into)
                total += pairs.sum(dim=-1, keepdim=True)
                share = total.reciprocal().masked_fill_(total == 0, 0)
                y.mul_(share)
                self.put(dens.unsqueeze(-1), block, share)
            elif self.spec.gain != 1:
                y.mul_(self.spec.gain)
            self.put(out, block, y)
        return sums, starts

    def pairs(self, products: Tensor, weights: Weights) -> Tensor:
        """Products (B, H, n, G Cq, C) of queries and keys, weighted in place."""
        products.unflatten(3, (self.groups, -1)).mul_(weights.pair)
        return products

    def backward(self, starts, last, out, dens, grad, dq, dk, dv) -> tuple[Tensor, Tensor | None]:
        """Fills dq, dk and dv, from the last block to the first; `last` are the gradients of S and n at the end.
        Returns those before the first block."""
        d_sums, d_norms = last
        for block, sums in zip(reversed(list(self.blocks())), reversed(starts), strict=True):
            x_k, phi_k, mu, values = self.keys(block)
            weights = self.weights(block, mu, sums.top)
            into = weights.into
            d_before, d_norms_before = None, None
            if block.queries is not None:
                before, _ = self.sums(phi_k, values, sums, weights)
                x_q, phi_q = self.queries(block)
                dy, d_total = self.output_gradient(block, out, dens, grad)
                some = dy if into is None else dy * into
                d_phi = some @ before.values.mT
                d_before = phi_q.mT @ some
                if d_total is not None:
                    some = d_total if into is None else d_total * into
                    d_phi.addcmul_(some, before.norms.unsqueeze(-2))
                    d_norms_before = (phi_q.mT @ some).squeeze(-1)
            d_sums, d_own = self.spread(d_before, d_sums, weights, block.chunks)
            d_values, d_phi_k = phi_k @ d_own, values @ d_own.mT
            if d_norms is not None:
                d_norms, d_own = self.spread(d_norms_before, d_norms, weights, block.chunks)
                d_phi_k += d_own.unsqueeze(-2)
            if weights.after is not None:
                d_values.mul_(weights.after)
                d_phi_k.mul_(weights.after)
            if block.queries is not None:
                d_pairs = dy @ values.mT
                d_pairs = d_pairs if d_total is None else d_pairs.add_(d_total)
                pairs, d_pairs = (self.pairs(x, weights) for x in (phi_q @ phi_k.mT, d_pairs))
                d_values += pairs.mT @ dy
                d_phi_k += d_pairs.mT @ phi_q
                d_phi += d_pairs @ phi_k
                d_x = self.spec.map.backward(x_q, self.directions, phi_q, d_phi)
                self.put(dq, block, scaled(d_x, self.spec.factors[0], self.dtype))
            d_x = scaled(self.spec.map.backward(x_k, self.directions, phi_k, d_phi_k), self.spec.factors[1], self.dtype)
            d_x, d_values = d_x.flatten(2, 3), d_values.flatten(2, 3)
            if self.mask is not None:
                unreal = ~self.mask[:, None, slice(*block.keys), None]
                d_x, d_values = d_x.masked_fill(unreal, 0), d_values.masked_fill(unreal, 0)
            dk[self.rows, :, slice(*block.keys)] = d_x
            dv[self.rows, :, slice(*block.keys)] = d_values
        return d_sums, d_norms

    def spread(self, d_before: Tensor | None, d_after: Tensor, weights: Weights, chunks: int) -> tuple[Tensor, Tensor]:
        """From the gradients of a sum before every chunk (None: none) and after the last: that of the sum before the
        block, and those of the chunks' own parts."""
        after = d_after.unsqueeze(2)
        if d_before is None:
            d_before = torch.zeros_like(after).expand(-1, -1, chunks, *after.shape[3:])
        stack = torch.cat([d_before, after], dim=2)
        mixed = (weights.mix.mT @ stack.flatten(3)).view_as(stack)
        return mixed[:, :, 0], mixed[:, :, 1:]

    def output_gradient(self, block: Block, out, dens, grad) -> tuple[Tensor, Tensor | None]:
        """d y (B, H, m, G C, V) of the weighted sum, and of the normaliser (.., 1) if there is one."""
        dy = self.by_chunk(grad[self.rows], block).to(self.dtype)
        if not self.spec.normalize:
            return dy * self.spec.gain, None
        dy = dy * self.by_chunk(dens[self.rows].unsqueeze(-1), block)
        return dy, -(dy * self.by_chunk(out[self.rows], block)).sum(dim=-1, keepdim=True)


def _ratio(high: Tensor, low: Tensor) -> Tensor:
    """exp(high - low), at most 1, and 0 where both are -inf."""
    return torch.exp((high - low).clamp_(max=0).nan_to_num_(nan=-torch.inf, neginf=-torch.inf))
