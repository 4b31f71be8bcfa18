"""Dense softmax attention: every query sees every key, or every key up to its own when causal."""

from __future__ import annotations

from torch import Tensor

from effattn.interface import Backend, Cost, Shape, Traits
from effattn.kernels import flash
from effattn.registry import register


@register("dense")
class Dense(Backend):
    """softmax(scale q k^T) v, exactly."""

    traits = Traits(exact=True, causal=True, bidirectional=True, learned=False, state="full")
    implementations = flash.IMPLEMENTATIONS
    plain = True

    def __init__(self, impl: str = "auto"):
        super().__init__(impl)
        self.chosen_impl = flash.choose(impl)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, padding_mask: Tensor | None, scale: float
    ) -> Tensor:
        return flash.attention(q, k, v, causal=causal, padding_mask=padding_mask, scale=scale, impl=self.chosen_impl)

    def cost(self, shape: Shape) -> Cost:
        """Two matrix products over the (query, key) pairs that see each other; q, k, v and the output moved once.

        The softmax's own operations are not counted, as everywhere.
        """
        pairs = shape.queries * shape.keys
        if shape.causal:
            pairs -= shape.queries * (shape.queries - 1) // 2
        return Cost(
            flops=2 * shape.batch * shape.heads * pairs * (shape.head_dim + shape.value_dim),
            read_bytes=shape.query_bytes + shape.kv_bytes,
            write_bytes=shape.output_bytes,
            state_bytes=shape.kv_bytes,
        )
