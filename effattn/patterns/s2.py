"""S2-Attn, LongLoRA's shifted blocks (arXiv:2309.12307), causal-safe: nothing wraps round to the
future.
"""

from __future__ import annotations

import torch

from effattn.interface import Traits
from effattn.kernels.flash.pattern import Blocks
from effattn.patterns.exact import ExactBackend, check_size
from effattn.registry import register
from effattn.states.full import RingState


@register("s2")
class ShiftedBlocks(ExactBackend):
    """Attention inside blocks; the second half of the heads has its borders half a block earlier.

    The paper rolls the sequence, so that the last half block meets the first; here those are two
    short blocks."""

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="last block")

    def __init__(self, block: int, impl: str = "auto"):
        super().__init__(impl)
        self.block = check_size("s2", "block", block, least=2)
        if block % 2:
            raise ValueError(
                f"s2: block: got {block}, half a block is shifted; valid is {block - 1} or "
                f"{block + 1}"
            )

    def extra_repr(self) -> str:
        return f"block={self.block}, {super().extra_repr()}"

    def sees(self, i, j, h, heads, causal):
        shift = torch.where(h >= heads // 2, self.block // 2, 0)
        same = (i + shift) // self.block == (j + shift) // self.block
        return same & (j <= i) if causal else same

    def pattern(self, causal):
        return Blocks(size=self.block, shifted=True)

    def new_state(self) -> RingState:
        return RingState(self.block)

    def pairs(self, i, shape):
        total, half = 0, shape.heads // 2
        for shift, heads in ((0, half), (self.block // 2, shape.heads - half)):
            low = (i + shift) // self.block * self.block - shift
            high = i + 1 if shape.causal else (low + self.block).clamp(max=shape.keys)
            total = total + heads * (high - low.clamp(min=0))
        return total

    def still_seen(self, j, shape):
        first = shape.keys - shape.queries
        shifts = {0, self.block // 2} if shape.heads > 1 else {self.block // 2}
        return sum((j + s) // self.block == (first + s) // self.block for s in shifts) > 0
