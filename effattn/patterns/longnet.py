"""LongNet's dilated attention (arXiv:2307.02486): segments of several lengths, each thinned by its
own dilation.

q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv). Of a branch: w, its segment; r, its dilation.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from effattn.interface import Traits
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.kernels.merge import merge
from effattn.patterns.aligned import aligned, in_pieces, whole
from effattn.patterns.exact import ExactBackend, check_size
from effattn.registry import register
from effattn.states.full import RingState

MOST = 4096  # tokens at a time on a CPU: what branches reorder then stays in its caches


@register("longnet")
class LongNet(ExactBackend):
    """Branch b cuts the sequence into segments of `segments[b]` tokens, in which head h keeps the
    positions p with p % dilations[b] == h % dilations[b] (p from the segment's start), for queries
    and keys alike.

    Branches are mixed by their softmax denominators (eq. 10), so that a key counts once for every
    branch that shows it. A query in no branch gives 0: one dilation should be 1. Dilations divide
    their segments."""

    traits = Traits(
        exact=True, causal=True, bidirectional=True, learned=False, state="last segment"
    )

    def __init__(self, segments: list[int], dilations: list[int], impl: str = "auto"):
        super().__init__(impl)
        for name, values in (("segments", segments), ("dilations", dilations)):
            if not isinstance(values, (list, tuple)) or not values:
                raise ValueError(
                    f"longnet: {name}: got {values!r}, valid is a list such as [512, 2048]"
                )
            for value in values:
                check_size("longnet", name, value)
        if len(segments) != len(dilations):
            raise ValueError(
                f"longnet: dilations: got {len(dilations)} for {len(segments)} segments; valid is "
                "one each"
            )
        for w, r in zip(segments, dilations, strict=True):
            if w % r:
                raise ValueError(
                    f"longnet: dilations: got {r} for segments of {w}; valid is a divisor of {w}"
                )
        self.segments, self.dilations = tuple(segments), tuple(dilations)

    def extra_repr(self) -> str:
        return (
            f"segments={list(self.segments)}, dilations={list(self.dilations)}, "
            f"{super().extra_repr()}"
        )

    def sees(self, i, j, h, heads, causal):
        count = 0
        for w, r in zip(self.segments, self.dilations, strict=True):
            kept = (i % w % r == h % r) & (j % w % r == h % r)
            count = count + ((i // w == j // w) & kept).int()
        return count * (j <= i) if causal else count

    def new_state(self) -> RingState:
        return RingState(max(self.segments))

    def attend_many(self, q, k, v, call, impl, lse):
        if not whole(q, k, call.layout):
            return in_pieces(self, q, k, v, call, impl, lse)

        def piece(q, k, v, layout):
            branches = zip(self.segments, self.dilations, strict=True)
            return merge([self._branch(w, r, q, k, v, layout, call, impl) for w, r in branches])

        def run(q, k, v, layout):
            step = math.lcm(*self.segments)  # no segment reaches over its multiples
            if q.device.type != "cpu" or step > MOST:
                return piece(q, k, v, layout)
            step *= MOST // step
            parts = [x.split(step, dim=2) for x in (q, k, v)]
            masks = (
                itertools.repeat(None) if layout.mask is None else layout.mask.split(step, dim=1)
            )
            done = [
                piece(*qkv, Layout(mask=mask)) for *qkv, mask in zip(*parts, masks, strict=False)
            ]
            return tuple(torch.cat(each, dim=2) for each in zip(*done, strict=True))

        out, sums = aligned(run, q, k, v, call.layout)
        return (out, sums) if lse else out

    def _branch(
        self, w: int, r: int, q, k, v, layout: Layout, call, impl: str
    ) -> tuple[Tensor, Tensor]:
        """Segments become rows of a batch; of their w positions, the heads of each offset keep
        their own w / r.
        """
        # a segment longer than the sequence is the sequence; it stays a multiple of r
        batch, heads, tokens, _ = q.shape
        w = min(w, -(-tokens // r) * r)
        end = -(-tokens // w) * w
        group = heads // k.shape[1]
        real = layout.mask
        if real is None and end > tokens and not call.causal:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
        if real is not None:
            real = pad(real, (0, end - tokens), value=False)
        # (B, H, segments, places, offsets, D): token number w s + r p + o at [s, p, o]
        q, k, v = (
            pad(x, (0, 0, 0, end - tokens)).unflatten(2, (end // w, w // r, r)) for x in (q, k, v)
        )
        # what no head of this branch keeps has no keys: 0, and a log-sum-exp of -inf
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        sums = q.new_full(
            q.shape[:-1], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        for offset in range(min(r, heads)):
            # the heads h with h % r == offset, and the K/V heads that they read (with r > 1 a
            # group's heads have different offsets, so each brings its own copy)
            own = torch.arange(offset, heads, r, device=q.device)
            shared = own // group if r > 1 else torch.arange(k.shape[1], device=q.device)
            rows = (
                x[:, index, :, :, offset].transpose(1, 2).flatten(0, 1)
                for x, index in ((q, own), (k, shared), (v, shared))
            )
            inner = Layout()
            if real is not None:
                mask = real.unflatten(1, (end // w, w // r, r))[..., offset].flatten(0, 1)
                inner = Layout(mask=mask)
            got, got_sums = flash.attention(
                *rows,
                Pattern(),
                inner,
                causal=call.causal,
                scale=call.scale,
                softcap=call.softcap,
                impl=impl,
                lse=True,
            )
            got, got_sums = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (got, got_sums))
            out[:, own, :, :, offset] = got
            sums[:, own, :, :, offset] = got_sums.to(sums.dtype)
        return out.flatten(2, 4)[:, :, :tokens], sums.flatten(2, 4)[:, :, :tokens]

    def pairs(self, i, shape):
        total = 0
        for w, r in zip(self.segments, self.dilations, strict=True):
            low = i // w * w
            high = i + 1 if shape.causal else (low + w).clamp(max=shape.keys)
            offset = i % r
            heads = (shape.heads - offset - 1).clamp(min=-r) // r + 1  # how many have this offset
            total = total + heads * -((offset + low - high) // r)
        return total

    def still_seen(self, j, shape):
        first = shape.keys - shape.queries
        seen = torch.zeros_like(j, dtype=torch.bool)
        for w, r in zip(self.segments, self.dilations, strict=True):
            next_query = first + (j - first) % r
            seen |= (j // w == next_query // w) & (next_query < shape.keys) & (j % r < shape.heads)
        return seen
