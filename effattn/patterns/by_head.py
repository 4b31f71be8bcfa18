"""A pattern that is another one in some heads: the heads in groups, one backend each.

q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv). The unit is the K/V head, whose query heads
go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from effattn.interface import Backend, Cost, Shape
from effattn.positions.bound import Positions
from effattn.states.by_head import HeadStates


class ByHead(nn.Module):
    """`backends`, of which each has its K/V heads in `heads`; all of them together have every head
    once."""

    def __init__(self, backends: Sequence[Backend], heads: Sequence[Sequence[int]]):
        super().__init__()
        self.backends = nn.ModuleList(backends)
        self.heads = [list(one) for one in heads]
        self.kv_heads = sum(map(len, heads))
        # where each head's output is, once those of all groups lie one behind the other
        given = [head for one in self.heads for head in one]
        self.back = [given.index(head) for head in range(self.kv_heads)]

    def new_state(self) -> HeadStates:
        """One state a group."""
        return HeadStates([one.new_state() for one in self.backends])

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        mask: Tensor | None,
        state: HeadStates | None,
        scale,
        rotary,
        extras: dict,
    ) -> Tensor:
        """As `Backend.run`, on checked arguments."""
        found = []
        if state is not None:
            state.tell()
        for at, (backend, own) in enumerate(zip(self.backends, self.heads, strict=True)):
            part = None if state is None else state.parts[at]
            some = (self._of(x, own) for x in (q, k, v))
            beside = dict(extras)
            if beside.get("sink_logits") is not None:
                beside["sink_logits"] = self._of(beside["sink_logits"][None], own)[0]
            rule = rotary
            if isinstance(rotary, Positions) and rotary.bias is not None:
                group = q.shape[1] // self.kv_heads
                rule = rotary.of_heads([h * group + n for h in own for n in range(group)])
            found.append(backend.run(*some, causal, mask, part, scale, rule, beside))
        if self.back == [*range(self.kv_heads)]:
            return torch.cat(found, dim=1)
        return self._of(torch.cat(found, dim=1), self.back)

    def _of(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """The query or K/V heads of x (B, H, ...) that belong to K/V heads, in their order: a view
        where these lie side by side."""
        group, first = x.shape[1] // self.kv_heads, heads[0]
        if list(heads) == [*range(first, first + len(heads))]:
            return x[:, first * group : (first + len(heads)) * group]
        at = torch.tensor(heads, device=x.device)[:, None] * group
        return x.index_select(1, (at + torch.arange(group, device=x.device)).flatten())

    def shapes(self, shape: Shape) -> list[Shape]:
        """Of a call of all heads, what each backend gets."""
        group = shape.heads // shape.kv_heads
        counts = map(len, self.heads)
        return [replace(shape, heads=group * count, kv_heads=count) for count in counts]

    def cost(self, shape: Shape) -> Cost:
        """The sum of the groups'."""
        given = zip(self.backends, self.shapes(shape), strict=True)
        return sum((one.cost(own) for one, own in given), Cost())
