"""The fixed pattern of the Sparse Transformer (arXiv:1904.10509): own block, and the last positions
of earlier ones.

q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv); i, j: positions of queries and keys.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import pad

from effattn.interface import Traits
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Blocks, Layout, Pattern
from effattn.kernels.merge import merge
from effattn.patterns.aligned import aligned, in_pieces, whole
from effattn.patterns.exact import ExactBackend, check_size
from effattn.registry import register
from effattn.states.full import RingState


@register("fixed")
class Fixed(ExactBackend):
    """Sees its own block of `stride` up to itself, and the last `summary` positions of every
    earlier block.

    The paper's pattern is autoregressive, so causal only. The state is the last block and the
    summaries."""

    traits = Traits(
        exact=True, causal=True, bidirectional=False, learned=False, state="last block, summaries"
    )

    def __init__(self, stride: int, summary: int = 1, impl: str = "auto"):
        super().__init__(impl)
        self.stride = check_size("fixed", "stride", stride)
        self.summary = check_size("fixed", "summary", summary)
        if summary > stride:
            raise ValueError(f"fixed: summary: got {summary}, valid is 1 to stride ({stride})")

    def extra_repr(self) -> str:
        return f"stride={self.stride}, summary={self.summary}, {super().extra_repr()}"

    def sees(self, i, j, h, heads, causal):
        own = i // self.stride == j // self.stride
        return (j <= i) & (own | (j % self.stride >= self.stride - self.summary))

    def new_state(self) -> RingState:
        return RingState(self.stride, partial(_summaries, self.stride, self.summary))

    def attend_many(self, q, k, v, call, impl, lse):
        if not whole(q, k, call.layout):
            return in_pieces(self, q, k, v, call, impl, lse)
        out, sums = aligned(
            lambda q, k, v, layout: self._parts(q, k, v, layout, call, impl), q, k, v, call.layout
        )
        return (out, sums) if lse else out

    def _parts(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, call, impl: str
    ) -> tuple[Tensor, Tensor]:
        """Positions are token numbers here. Queries of one block see the same summaries, so that
        they can stand side by side as heads, one step of time a block; each of the `summary` places
        in a block is a sequence of its own."""
        # Own blocks and summaries of earlier ones are disjoint sets of keys, so that their
        # softmaxes merge exactly by log-sum-exp.
        options = dict(scale=call.scale, softcap=call.softcap, impl=impl, lse=True)
        parts = [flash.attention(q, k, v, Blocks(size=self.stride), layout, **options)]
        batch, heads, tokens, _ = q.shape
        blocks = -(-tokens // self.stride)
        if blocks == 1:
            return parts[0]
        # (B, Hq stride, blocks, D): a causal attention over blocks, `stride` queries a block
        rows = pad(q, (0, 0, 0, blocks * self.stride - tokens)).unflatten(2, (blocks, self.stride))
        rows = rows.transpose(2, 3).reshape(batch, heads * self.stride, blocks, -1)
        for place in range(self.stride - self.summary, self.stride):
            # Keys move up by one block, so that a query sees those of earlier blocks only; the
            # first one is empty.
            keys, values = (
                pad(x[:, :, place :: self.stride][:, :, : blocks - 1], (0, 0, 1, 0)) for x in (k, v)
            )
            real = layout.mask
            real = q.new_ones(batch, tokens).bool() if real is None else real
            mask = pad(real[:, place :: self.stride][:, : blocks - 1], (1, 0), value=False)
            start = mask.new_ones(batch).long()  # every position is one less, block 0's is not real
            out, sums = flash.attention(
                rows, keys, values, Pattern(), Layout(start=start, mask=mask), **options
            )
            out = (
                out.view(batch, heads, self.stride, blocks, -1)
                .transpose(2, 3)
                .flatten(2, 3)[:, :, :tokens]
            )
            sums = (
                sums.view(batch, heads, self.stride, blocks)
                .transpose(2, 3)
                .flatten(2, 3)[:, :, :tokens]
            )
            parts.append((out, sums))
        return merge(parts)

    def pairs(self, i, shape):
        return shape.heads * (i % self.stride + 1 + i // self.stride * self.summary)

    def still_seen(self, j, shape):
        own = j // self.stride == (shape.keys - shape.queries) // self.stride
        return own | (j % self.stride >= self.stride - self.summary)


def _summaries(stride: int, summary: int, n: int) -> list[int]:
    """The positions below n that later blocks see."""
    ends = range(stride, n + stride, stride)
    return [p for end in ends for p in range(end - summary, end) if p < n]
