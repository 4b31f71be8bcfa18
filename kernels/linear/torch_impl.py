"""Chunked linear attention in plain torch, forward and backward, at linear cost and with features for one block at a
time: T x F is never held, T x T even less.

Inside a chunk of C tokens pairs are multiplied out; what is before it comes as sums S = sum phi(k) v'. A block of a
few chunks is one step of a Python loop, sized so that its temporaries stay in the processor's cache. Its chunks' sums
are made from each other by one small triangular matrix (`mix`), which holds the decay and the changes of scale.

    B rows, H key/value heads, G query heads to each, n chunks of C tokens
    (B, H, n, C, .) keys, (B, H, n, G C, .) queries
    v' = [v, 1]: the normaliser is one more column of the values; V' columns in all
    w  = decay^(t - j) exp(mu_j - c_t): the pair's weight, c_t the highest mu so far, so that w <= 1; it cancels
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .features import MAPS, FeatureMap

CHUNK = 64
WHOLE = 64  # up to so many keys are one chunk, whatever the queries are (decoding)
BUDGET = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements of a block's largest temporary


class Spec(NamedTuple):
    """What a call is about, besides its tensors. `factors`: of q and k before the feature map; `gain`: of the output;
    `keep`: whether the memory at the end is wanted."""

    feature_map: str
    factors: tuple[float, float]
    normalize: bool
    causal: bool
    gain: float
    keep: bool
    chunk: int

    @property
    def map(self) -> FeatureMap:
        return MAPS[self.feature_map]


class Block(NamedTuple):
    """Tokens [start, stop) of the keys, and of the queries; None: takes none of them."""

    keys: tuple[int, int] | None
    queries: tuple[int, int] | None
    chunks: int = 1


class Weights(NamedTuple):
    """Of one block: pair (.., n, 1, Cq, C), into (.., n, G Cq, 1) of what comes in, after (.., n, C, 1) up to the
    chunk's end, mix (.., n + 1, n + 1), and the highest mu (B, H) at the end. None: ones, or no mu."""

    pair: Tensor | None
    into: Tensor | None
    after: Tensor | None
    mix: Tensor
    top: Tensor | None


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
    """`effattn.kernels.linear.attention` and `fold` (q None): out, and with `keep` the memory's sums, norms and top."""
    spec = Spec(feature_map, factors, normalize, causal, gain, keep, CHUNK)
    return _Attention.apply(q, k, v, *(memory or (None, None, None)), directions, mask, decay, spec)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sums, norms, top, directions, mask, decay, spec):
        totals, starts, parts = [], [], _rows(q, k, spec, directions)
        out = None if q is None else q.new_empty(*q.shape[:3], v.shape[3])
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        dens = None if q is None or not spec.normalize else q.new_empty(q.shape[:3], dtype=dtype)
        for rows in parts:
            call = _Call(q, k, v, directions, mask, decay, spec, rows, dtype)
            total, start = call.forward(call.start(sums, norms, top), out, dens, keep=any(ctx.needs_input_grad))
            totals.append(total)
            starts.append(start)
        ctx.spec, ctx.parts, ctx.starts = spec, parts, starts
        ctx.save_for_backward(q, k, v, directions, mask, decay, out, dens)
        ctx.had_memory = sums is not None
        ctx.set_materialize_grads(False)
        if not spec.keep:
            return out, None, None, None
        total = torch.cat([s for s, _ in totals]) if len(totals) > 1 else totals[0][0]
        top = None
        if spec.map.weighs:
            top = torch.cat([t for _, t in totals])
            ctx.mark_non_differentiable(top)
        if not spec.normalize:
            return out, total, None, top
        return out, total[..., :-1].contiguous(), total[..., -1].contiguous(), top

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_sums, grad_norms, _):
        q, k, v, directions, mask, decay, out, dens = ctx.saved_tensors
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        if q is not None and grad is None:
            grad = torch.zeros_like(out)
        dq, dk, dv = (None if x is None else torch.empty_like(x) for x in (q, k, v))
        first = []
        for rows, starts in zip(ctx.parts, ctx.starts, strict=True):
            call = _Call(q, k, v, directions, mask, decay, ctx.spec, rows, dtype)
            last = call.memory_gradient(grad_sums, grad_norms)
            first.append(call.backward(starts, last, out, dens, grad, dq, dk, dv))
        d_sums = d_norms = None
        if ctx.had_memory:
            d_sums = torch.cat(first)
            if ctx.spec.normalize:
                d_sums, d_norms = d_sums[..., :-1], d_sums[..., -1]
        return dq, dk, dv, d_sums, d_norms, None, None, None, None, None


def _rows(q: Tensor | None, k: Tensor, spec: Spec, directions: Tensor | None) -> list[slice]:
    """Batch rows that go together: one chunk of theirs fits the budget."""
    batch, heads = k.shape[0], k.shape[1] if q is None else q.shape[1]
    widest = max(k.shape[3] if directions is None else directions.shape[0], spec.chunk)
    step = max(1, BUDGET[k.device.type] // (heads * spec.chunk * widest))
    return [slice(b, min(b + step, batch)) for b in range(0, max(batch, 1), step)]


class _Call:
    """The sweep over the blocks of some batch rows, in either direction."""

    def __init__(self, q, k, v, directions, mask, decay, spec: Spec, rows: slice, dtype: torch.dtype):
        self.q, self.k, self.v = (None if x is None else x[rows] for x in (q, k, v))
        self.mask = None if mask is None else mask[rows]
        self.directions = None if directions is None else directions.to(dtype)
        self.log_decay = None if decay is None else decay.to(dtype).log()
        self.spec, self.rows, self.dtype = spec, rows, dtype
        self.features = k.shape[3] if directions is None else directions.shape[0]
        self.width = v.shape[3] + spec.normalize  # V'
        self.groups = 1 if q is None else q.shape[1] // k.shape[1]
        self._static: dict[tuple, Weights] = {}

    def start(self, sums, norms, top) -> tuple[Tensor, Tensor | None]:
        """(S (B, H, F, V'), c (B, H) or None) before the first block."""
        batch, heads = self.k.shape[:2]
        if sums is None:
            zero = self.k.new_zeros(batch, heads, self.features, self.width, dtype=self.dtype)
            return zero, zero.new_full((batch, heads), -torch.inf) if self.spec.map.weighs else None
        sums = sums[self.rows].to(self.dtype)
        if self.spec.normalize:
            sums = torch.cat([sums, norms[self.rows, :, :, None].to(self.dtype)], dim=-1)
        return sums, None if top is None else top[self.rows].to(self.dtype)

    def memory_gradient(self, sums, norms) -> Tensor:
        batch, heads = self.k.shape[:2]
        total = self.k.new_zeros(batch, heads, self.features, self.width, dtype=self.dtype)
        if sums is not None:
            total[..., : self.v.shape[3]] += sums[self.rows]
        if norms is not None:
            total[..., -1] += norms[self.rows]
        return total

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

        if not self.spec.causal:
            yield from (Block((a, b), None, n) for a, b, n in steps(0, keys))
            yield from (Block(None, (a, b)) for a, b, _ in steps(0, queries))
        elif queries and keys <= WHOLE:
            yield Block((0, keys), (0, queries))
        else:
            yield from (Block((a, b), None, n) for a, b, n in steps(0, first))
            yield from (Block((a, b), (a - first, b - first), n) for a, b, n in steps(first, keys))

    # One block's tensors -------------------------------------------------------------------------------------------

    def keys(self, block: Block):
        """x, phi (B, H, n, C, F), mu (B, H, n, C) or None, v' (B, H, n, C, V') of the block's keys."""
        tokens = slice(*block.keys)
        x = self.k[:, :, tokens].to(self.dtype) * self.spec.factors[1]
        values = self.v[:, :, tokens].to(self.dtype)
        if self.spec.normalize:
            values = torch.nn.functional.pad(values, (0, 1), value=1.0)
        real = None
        if self.mask is not None:
            real = self.mask[:, None, tokens, None]
            x, values = x.masked_fill(~real, 0), values.masked_fill(~real, 0)
        phi, mu = self.spec.map.forward(x, self.directions)
        if mu is not None and real is not None:
            mu = mu.masked_fill(~real[..., 0], -torch.inf)
        elif real is not None:
            phi = phi * real
        x, phi, mu, values = (None if y is None else y.unflatten(2, (block.chunks, -1)) for y in (x, phi, mu, values))
        return x, phi, mu, values

    def queries(self, block: Block):
        """x and phi (B, H, n, G C, .) of the block's queries."""
        x = self.by_chunk(self.q, block).to(self.dtype) * self.spec.factors[0]
        return x, self.spec.map.forward(x, self.directions)[0]

    def by_chunk(self, x: Tensor, block: Block) -> Tensor:
        """(B, H G, T, .) -> the block's (B, H, n, G C, .)."""
        some = x[:, :, slice(*block.queries)]
        some = some.unflatten(2, (block.chunks, -1)).unflatten(1, (self.k.shape[1], self.groups))
        return some.transpose(2, 3).flatten(3, 4)

    def put(self, out: Tensor, block: Block, x: Tensor) -> None:
        """The inverse of `by_chunk`, into `out` (whose rows are the whole batch's)."""
        x = x.unflatten(3, (self.groups, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        out[self.rows, :, slice(*block.queries)] = x

    def weights(self, block: Block, mu: Tensor | None, top: Tensor | None) -> Weights:
        if block.keys is None:
            return Weights(None, None, None, None, top)
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
        ends = torch.cat([top[..., None], highest[..., -1]], dim=-1)  # (B, H, n + 1)
        rows = highest[..., highest.shape[-1] - queries :]
        pair = _ratio(mu[:, :, :, None, None, :], rows[:, :, :, None, :, None]).mul_(static.pair)
        into = _ratio(ends[..., :-1, None], rows).repeat(1, 1, 1, self.groups)[..., None]
        after = _ratio(mu, ends[..., 1:, None])[..., None]
        mix = _ratio(ends[..., None, :], ends[..., :, None]) * static.mix
        return Weights(pair, into, after, mix, ends[..., -1])

    def sums(self, phi: Tensor, values: Tensor, before: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """S before every chunk (B, H, n, F, V'), and after the last."""
        own = (phi if weights.after is None else phi * weights.after).mT @ values
        stack = torch.cat([before.unsqueeze(2), own], dim=2)
        mixed = (weights.mix @ stack.flatten(3)).view_as(stack)
        return mixed[:, :, :-1], mixed[:, :, -1]

    # The sweeps ----------------------------------------------------------------------------------------------------

    def forward(self, memory, out: Tensor | None, dens: Tensor | None, keep: bool):
        """Fills `out` and `dens`; ((S, c) at the end, those before every block if `keep`)."""
        sums, top = memory
        starts = []
        blocks = list(self.blocks())
        for block in blocks:
            if keep:
                starts.append((sums, top))
            mu = phi_k = None
            if block.keys is not None:
                _, phi_k, mu, values = self.keys(block)
            weights = self.weights(block, mu, top)
            before = sums.unsqueeze(2)
            last = block is blocks[-1] and block.chunks == 1 and not self.spec.keep
            if block.keys is not None and not last:
                before, sums = self.sums(phi_k, values, sums, weights)
                top = weights.top
            if block.queries is None:
                continue
            _, phi_q = self.queries(block)
            y = phi_q @ before
            if weights.into is not None:
                y.mul_(weights.into)
            if block.keys is not None:
                pairs = self.pairs(phi_q @ phi_k.mT, weights)
                y += pairs @ values
            if self.spec.normalize:
                total = y[..., -1:]
                share = total.reciprocal().masked_fill_(total == 0, 0)
                y = y[..., :-1] * share
                self.put(dens.unsqueeze(-1), block, share)
            elif self.spec.gain != 1:
                y = y * self.spec.gain
            self.put(out, block, y)
        return (sums, top), starts

    def pairs(self, products: Tensor, weights: Weights) -> Tensor:
        """Products (B, H, n, G Cq, C) of queries and keys, weighted in place."""
        products.unflatten(3, (self.groups, -1)).mul_(weights.pair)
        return products

    def backward(self, starts, d_sums: Tensor, out, dens, grad, dq, dk, dv) -> Tensor:
        """Fills dq, dk and dv, from the last block to the first; the gradient of S before the first one."""
        for block, (sums, top) in zip(reversed(list(self.blocks())), reversed(starts), strict=True):
            mu = phi_k = None
            if block.keys is not None:
                x_k, phi_k, mu, values = self.keys(block)
            weights = self.weights(block, mu, top)
            before = sums.unsqueeze(2)
            if block.queries is not None:
                if block.keys is not None:
                    before, _ = self.sums(phi_k, values, sums, weights)
                x_q, phi_q = self.queries(block)
                dn = self.output_gradient(block, out, dens, grad)
                scaled = dn if weights.into is None else dn * weights.into
                d_phi = scaled @ before.mT
                d_before = phi_q.mT @ scaled
            if block.keys is None:
                self.put(dq, block, self.spec.map.backward(x_q, self.directions, phi_q, d_phi) * self.spec.factors[0])
                d_sums = d_sums + d_before[:, :, 0]
                continue
            if block.queries is None:
                d_before = torch.zeros_like(before).expand(-1, -1, block.chunks, -1, -1)
            stack = torch.cat([d_before, d_sums.unsqueeze(2)], dim=2)
            mixed = (weights.mix.mT @ stack.flatten(3)).view_as(stack)
            d_sums, d_own = mixed[:, :, 0], mixed[:, :, 1:]
            d_values, d_phi_k = phi_k @ d_own, values @ d_own.mT
            if weights.after is not None:
                d_values.mul_(weights.after)
                d_phi_k.mul_(weights.after)
            if block.queries is not None:
                pairs, d_pairs = (self.pairs(x, weights) for x in (phi_q @ phi_k.mT, dn @ values.mT))
                d_values += pairs.mT @ dn
                d_phi_k += d_pairs.mT @ phi_q
                d_phi += d_pairs @ phi_k
                self.put(dq, block, self.spec.map.backward(x_q, self.directions, phi_q, d_phi) * self.spec.factors[0])
            d_x = self.spec.map.backward(x_k, self.directions, phi_k, d_phi_k) * self.spec.factors[1]
            d_x, d_values = d_x.flatten(2, 3), d_values[..., : self.v.shape[3]].flatten(2, 3)
            if self.mask is not None:
                unreal = ~self.mask[:, None, slice(*block.keys), None]
                d_x, d_values = d_x.masked_fill(unreal, 0), d_values.masked_fill(unreal, 0)
            dk[self.rows, :, slice(*block.keys)] = d_x
            dv[self.rows, :, slice(*block.keys)] = d_values
        return d_sums

    def output_gradient(self, block: Block, out, dens, grad) -> Tensor:
        """d n' (B, H, n, G C, V'): of the weighted sum, and of the normaliser."""
        dn = self.by_chunk(grad[self.rows], block).to(self.dtype)
        if not self.spec.normalize:
            return dn * self.spec.gain
        share = self.by_chunk(dens[self.rows].unsqueeze(-1), block)
        rows = self.by_chunk(out[self.rows], block)
        d_total = -(dn * rows).sum(dim=-1, keepdim=True)
        return torch.cat([dn, d_total], dim=-1) * share


def _ratio(high: Tensor, low: Tensor) -> Tensor:
    """exp(high - low), at most 1, and 0 where both are -inf."""
    return torch.exp((high - low).clamp_(max=0).nan_to_num_(nan=-torch.inf, neginf=-torch.inf))
