"""Causal linear attention in plain torch: a sweep over blocks of chunks, forward from the first,
backward from the end.

Inside a chunk of C tokens pairs are multiplied out; what is before it comes as a sum S. A block of
a few chunks is one step of a Python loop, sized so that its temporaries stay in the processor's
cache. Its chunks' sums are made from each other by one small triangular matrix (`mix`), which holds
the decay and the changes of scale. The normaliser is one more column of v, all ones: what is summed
with it are the features alone (a product with a vector of n would take as long as one with the
matrix S).

    B rows, H key/value heads, G query heads to each, m chunks of C tokens
    W = V + 1 with a normaliser, or V
    (B, H, m, C, .) keys, (B, H, m, G C, .) queries, S (B, H, F, W), y (B, H, m, G C, W)
    w = decay^(t - j) exp(mu_j - c_t): the pair's weight, c_t the highest mu so far, so that w <= 1;
        it cancels
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..scratch import Room
from .torch_parts import Spec, Sums, joined, output_gradient, scaled, share_of

WHOLE = 64  # up to so many keys are one chunk, whatever the queries are (decoding)
BUDGET = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements of a block's largest temporary


class Block(NamedTuple):
    """Tokens [start, stop) of the keys, and of the queries (None: takes none of them)."""

    keys: tuple[int, int]
    queries: tuple[int, int] | None
    chunks: int = 1


class Before(NamedTuple):
    """S (B, H, F, W) of all keys so far, relative to c, the highest mu (B, H), None for features
    without mu.
    """

    sums: Tensor
    top: Tensor | None


class Weights(NamedTuple):
    """Of one block: pair (.., m, 1, Cq, C), into (.., m, G Cq, 1) of what comes in, after (.., m,
    C, 1) up to the chunk's end, mix (.., m + 1, m + 1), and the highest mu (B, H) at the end. None:
    ones, or no mu."""

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

    def __init__(
        self, q, k, v, directions, mask, decay, spec: Spec, rows: slice, dtype: torch.dtype
    ):
        self.q, self.k, self.v = (None if x is None else x[rows] for x in (q, k, v))
        self.mask = None if mask is None else mask[rows]
        self.directions = None if directions is None else directions.to(dtype)
        self.log_decay = None if decay is None else decay.to(dtype).log()
        self.spec, self.rows, self.dtype = spec, rows, dtype
        self.features = k.shape[3] if directions is None else directions.shape[0]
        self.groups = 1 if q is None else q.shape[1] // k.shape[1]
        self.room = Room(dtype, k.device)  # of the features of one block
        self._static: dict[tuple, Weights] = {}

    def start(self, *memory) -> Before:
        """Of sums, norms and top (whole batches, or None): what is before the first block."""
        some = [None if x is None else x[self.rows] for x in memory]
        sums = Sums.of(self.k, self.v, self.spec, self.features, self.dtype, some)
        return Before(joined(sums.values, sums.norms), sums.top)

    def end(self, after: Tensor, top: Tensor | None = None) -> Sums:
        """`after` (B, H, F, W), S or its gradient, as S and n."""
        values = self.v.shape[3]
        return Sums(after[..., :values], after[..., values] if self.spec.normalize else None, top)

    def last(self, sums, norms) -> Tensor:
        """The gradient of S at the end, zeros where it is not given."""
        zero = self.end(self.start(None, None, None).sums)
        given = (None if x is None else x[self.rows].to(self.dtype) for x in (sums, norms))
        return joined(*(z if x is None else x for z, x in zip(zero[:2], given, strict=True)))

    def blocks(self) -> Iterator[Block]:
        """In the order of the forward sweep."""
        keys, chunk = self.k.shape[2], self.spec.chunk
        queries = 0 if self.q is None else self.q.shape[2]
        many = max(
            1,
            BUDGET[self.k.device.type]
            // (
                self.k.shape[0] * self.k.shape[1] * self.groups * chunk * max(self.features, chunk)
            ),
        )
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

    # One block's tensors
    # -------------------------------------------------------------------------------------------

    def keys(self, block: Block):
        """x, phi (B, H, m, C, F), mu (B, H, m, C) or None, v (B, H, m, C, W) of the block's keys. v
        is 0 where there is no key, and so is all that comes of it."""
        self.room.clear()
        tokens = slice(*block.keys)
        x, given = (y[:, :, tokens].unflatten(2, (block.chunks, -1)) for y in (self.k, self.v))
        x = scaled(x, self.spec.factors[1], self.dtype)
        values = x.new_ones(*given.shape[:4], given.shape[4] + self.spec.normalize)
        values[..., : given.shape[4]] = given
        real = None
        if self.mask is not None:
            real = self.mask[:, None, tokens].unflatten(2, (block.chunks, -1))[..., None]
            x, values = x.masked_fill(~real, 0), values.masked_fill_(~real, 0)
        phi, mu = self.spec.map.forward(x, self.directions, self.room)
        if mu is not None and real is not None:
            mu = mu.masked_fill(~real[..., 0], -torch.inf)
        return x, phi.contiguous(), mu, values

    def queries(self, block: Block):
        """x and phi (B, H, m, G C, .) of the block's queries."""
        x = scaled(self.by_chunk(self.q, block), self.spec.factors[0], self.dtype)
        return x, self.spec.map.forward(x, self.directions, self.room)[0].contiguous()

    def by_chunk(self, x: Tensor, block: Block) -> Tensor:
        """(B, H G, T, .) -> the block's (B, H, m, G C, .)."""
        some = x[:, :, slice(*block.queries)]
        some = some.unflatten(2, (block.chunks, -1)).unflatten(1, (self.k.shape[1], self.groups))
        return some.transpose(2, 3).flatten(3, 4)

    def put(self, out: Tensor, block: Block, x: Tensor, times: Tensor | float = 1.0) -> None:
        """The inverse of `by_chunk` of x * times, into `out` (whose rows are the whole batch's)."""
        out = out[self.rows, :, slice(*block.queries)].unflatten(2, (block.chunks, -1))
        out = out.unflatten(1, (self.k.shape[1], self.groups)).transpose(2, 3)  # (B, H, m, G, C, .)
        x, times = (
            y.unflatten(3, (self.groups, -1)) if isinstance(y, Tensor) else y for y in (x, times)
        )
        torch.mul(x, times, out=out)

    def weights(self, block: Block, mu: Tensor | None, top: Tensor | None) -> Weights:
        """The pairs' weights inside of a block's chunks; kept where nothing but its shape
        decides.
        """
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
        """With log weights: each row relative to the highest of its own past, so that the future
        changes no bit.
        """
        # c_t
        highest = torch.cummax(mu.flatten(2), dim=-1).values.maximum(top[..., None]).view_as(mu)
        ends = torch.cat([top[..., None], highest[..., -1]], dim=-1)  # (B, H, m + 1)
        rows = highest[..., highest.shape[-1] - queries :]
        pair = _ratio(mu[:, :, :, None, None, :], rows[:, :, :, None, :, None]).mul_(static.pair)
        into = _ratio(ends[..., :-1, None], rows).repeat(1, 1, 1, self.groups)[..., None]
        after = _ratio(mu, ends[..., 1:, None])[..., None]
        mix = _ratio(ends[..., None, :], ends[..., :, None]) * static.mix
        return Weights(pair, into, after, mix, ends[..., -1])

    def sums(
        self, phi: Tensor, values: Tensor, before: Before, weights: Weights
    ) -> tuple[Tensor, Before]:
        """S before every chunk (B, H, m, F, W), and what is before the next block."""
        weighted = phi if weights.after is None else phi * weights.after
        own, mix = weighted.mT @ values, weights.mix
        parts, first = own.flatten(3), before.sums.flatten(2).unsqueeze(2)
        sums = (mix[..., :-1, 1:] @ parts).addcmul_(mix[..., :-1, :1], first)
        after = (mix[..., -1:, 1:] @ parts).addcmul_(mix[..., -1:, :1], first)
        return sums.view_as(own), Before(after.view_as(before.sums), weights.top)

    # The sweeps
    # ----------------------------------------------------------------------------------------------

    def forward(
        self, before: Before, out: Tensor | None, dens: Tensor | None, keep: bool
    ) -> tuple[Sums, list[Before]]:
        """Fills `out` and, if given, `dens` (one over the normaliser). The sums at the end, and if
        `keep` before every block."""
        starts = []
        blocks = list(self.blocks())
        for block in blocks:
            if keep:
                starts.append(before)
            _, phi_k, mu, values = self.keys(block)
            weights = self.weights(block, mu, before.top)
            sums = before.sums.unsqueeze(2)
            if block is not blocks[-1] or block.chunks > 1 or self.spec.keep:
                sums, before = self.sums(phi_k, values, before, weights)
            if block.queries is None:
                continue
            _, phi_q = self.queries(block)
            y = phi_q @ sums
            if weights.into is not None:
                y.mul_(weights.into)
            pairs = self.pairs(phi_q @ phi_k.mT, weights)
            y.flatten(0, 2).baddbmm_(pairs.flatten(0, 2), values.flatten(0, 2))
            if self.spec.normalize:
                share = share_of(y[..., -1:])
                if dens is not None:
                    self.put(dens.unsqueeze(-1), block, share)
                self.put(out, block, y[..., :-1], share)
            else:
                self.put(out, block, y, self.spec.gain)
        return self.end(*before), starts

    def pairs(self, products: Tensor, weights: Weights) -> Tensor:
        """Products (B, H, n, G Cq, C) of queries and keys, weighted in place."""
        products.unflatten(3, (self.groups, -1)).mul_(weights.pair)
        return products

    def backward(self, starts, d_sums: Tensor, out, dens, grad, dq, dk, dv) -> Sums:
        """Fills dq, dk and dv, from the last block to the first; `d_sums` is the gradient of S at
        the end. Returns that before the first block."""
        for block, before in zip(reversed(list(self.blocks())), reversed(starts), strict=True):
            x_k, phi_k, mu, values = self.keys(block)
            weights = self.weights(block, mu, before.top)
            d_before = None
            if block.queries is not None:
                sums, _ = self.sums(phi_k, values, before, weights)
                x_q, phi_q = self.queries(block)
                dy = self.output_gradient(block, out, dens, grad)
                some = dy if weights.into is None else dy * weights.into
                d_phi = some @ sums.mT
                d_before = phi_q.mT @ some
            d_own, d_sums = self.spread(d_before, d_sums, weights)
            d_values, d_phi_k = phi_k @ d_own, values @ d_own.mT
            if weights.after is not None:
                d_values.mul_(weights.after)
                d_phi_k.mul_(weights.after)
            if block.queries is not None:
                pairs, d_pairs = (
                    self.pairs(x, weights) for x in (phi_q @ phi_k.mT, dy @ values.mT)
                )
                d_values.flatten(0, 2).baddbmm_(pairs.flatten(0, 2).mT, dy.flatten(0, 2))
                d_phi_k.flatten(0, 2).baddbmm_(d_pairs.flatten(0, 2).mT, phi_q.flatten(0, 2))
                d_phi.flatten(0, 2).baddbmm_(d_pairs.flatten(0, 2), phi_k.flatten(0, 2))
                d_x = self.spec.map.backward(x_q, self.directions, phi_q, d_phi)
                self.put(dq, block, d_x, self.spec.factors[0])
            d_x = scaled(
                self.spec.map.backward(x_k, self.directions, phi_k, d_phi_k),
                self.spec.factors[1],
                self.dtype,
            )
            d_x, d_values = d_x.flatten(2, 3), d_values[..., : dv.shape[3]].flatten(2, 3)
            if self.mask is not None:
                unreal = ~self.mask[:, None, slice(*block.keys), None]
                d_x, d_values = d_x.masked_fill(unreal, 0), d_values.masked_fill(unreal, 0)
            dk[self.rows, :, slice(*block.keys)] = d_x
            dv[self.rows, :, slice(*block.keys)] = d_values
        return self.end(d_sums)

    def spread(
        self, d_before: Tensor | None, d_after: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """The transpose of `sums`, from the gradients of S before every chunk (None: none) and
        after the last: those of the chunks' own parts (B, H, m, F, W), and of S before the
        block."""
        mix, last = weights.mix, d_after.flatten(2).unsqueeze(2)
        own, first = mix[..., -1:, 1:].mT * last, mix[..., -1:, :1] * last
        if d_before is not None:
            parts = d_before.flatten(3)
            own, first = own + mix[..., :-1, 1:].mT @ parts, first + mix[..., :-1, :1].mT @ parts
        return own.unflatten(3, d_after.shape[2:]), first.view_as(d_after)

    def output_gradient(self, block: Block, out, dens, grad) -> Tensor:
        """d y (B, H, m, G C, W) of the weighted sum, and of the normaliser if there is one."""
        given = self.by_chunk(grad[self.rows], block).to(self.dtype)
        if not self.spec.normalize:
            return (given * self.spec.gain).contiguous()
        share = self.by_chunk(dens[self.rows].unsqueeze(-1), block)
        return output_gradient(given, share, self.by_chunk(out[self.rows], block))


def _ratio(high: Tensor, low: Tensor) -> Tensor:
    """exp(high - low), at most 1, and 0 where both are -inf."""
    return torch.exp((high - low).clamp_(max=0).nan_to_num_(nan=-torch.inf, neginf=-torch.inf))
