"""The strided pattern of the Sparse Transformer (arXiv:1904.10509): neighbours, and a column of
distant keys.
"""

from __future__ import annotations

from effattn.interface import Traits
from effattn.kernels import flash
from effattn.kernels.flash.pattern import Pattern, Window
from effattn.kernels.merge import merge
from effattn.patterns.exact import ExactBackend, check_size
from effattn.patterns.residues import by_residue
from effattn.registry import register


@register("strided")
class Strided(ExactBackend):
    """Sees the `stride` newest keys, and every stride-th key before: i - j < stride or (i - j) %
    stride == 0.

    The paper's pattern is autoregressive, so causal only. Later queries need keys of every residue:
    the state is full."""

    traits = Traits(exact=True, causal=True, bidirectional=False, learned=False, state="full")

    def __init__(self, stride: int, impl: str = "auto"):
        super().__init__(impl)
        self.stride = check_size("strided", "stride", stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, {super().extra_repr()}"

    def sees(self, i, j, h, heads, causal):
        return (j <= i) & ((i - j < self.stride) | ((i - j) % self.stride == 0))

    def attend_many(self, q, k, v, call, impl, lse):
        def run(pattern):
            return lambda q, k, v, layout: flash.attention(
                q,
                k,
                v,
                pattern,
                layout,
                scale=call.scale,
                softcap=call.softcap,
                impl=impl,
                lse=True,
            )

        # The neighbours, and the column of keys a multiple of the stride away. The query's own key
        # is in both sets: `strict` leaves it out of the column, so that they are disjoint and
        # merge.
        row = run(Window(back=self.stride))(q, k, v, call.layout)
        column = by_residue(
            self.stride, q, k, v, call.layout, run(Pattern()), lse=True, strict=True
        )
        out, sums = merge([row, column])
        return (out, sums) if lse else out

    def pairs(self, i, shape):
        return shape.heads * ((i + 1).clamp(max=self.stride) + i // self.stride)

    def still_seen(self, j, shape):
        first = shape.keys - shape.queries
        return (first - j < self.stride) | (first + (j - first) % self.stride < shape.keys)
