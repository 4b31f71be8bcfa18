"""Block-local attention (BlockBERT, arXiv:1911.02972): a query sees its own block, and some blocks
before it.
"""

from __future__ import annotations

from effattn.interface import Traits
from effattn.kernels.flash.pattern import Blocks
from effattn.patterns.exact import ExactBackend, check_size
from effattn.registry import register
from effattn.states.full import RingState


@register("block")
class Block(ExactBackend):
    """A query sees its own block of `block` tokens and the `look_back` blocks before; what is not
    later, if causal.

    Blocks count from a row's first real token; the last one may be shorter.
    """

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="last blocks")

    def __init__(self, block: int, look_back: int = 0, impl: str = "auto"):
        super().__init__(impl)
        self.block = check_size("block", "block", block)
        self.look_back = check_size("block", "look_back", look_back, least=0)

    def extra_repr(self) -> str:
        return f"block={self.block}, look_back={self.look_back}, {super().extra_repr()}"

    def sees(self, i, j, h, heads, causal):
        behind = i // self.block - j // self.block
        near = (behind >= 0) & (behind <= self.look_back)
        return near & (j <= i) if causal else near

    def pattern(self, causal):
        return Blocks(size=self.block, look_back=self.look_back)

    def new_state(self) -> RingState:
        return RingState(self.block * (self.look_back + 1))

    def pairs(self, i, shape):
        low = (i // self.block - self.look_back).clamp(min=0) * self.block
        high = i + 1 if shape.causal else ((i // self.block + 1) * self.block).clamp(max=shape.keys)
        return shape.heads * (high - low)

    def still_seen(self, j, shape):
        return (shape.keys - shape.queries) // self.block - j // self.block <= self.look_back
