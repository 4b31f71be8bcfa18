"""q, k, v or o of one attention layer, by head: views of the model's own weights, also where they are fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from effattn.errors import Unsupported
from effattn.projections.monarch import MonarchLinear


@dataclass(frozen=True)
class Projection:
    """q, k, v or o of one layer. For fused modules, a view of its rows."""

    module: nn.Linear | MonarchLinear
    heads: int
    head_dim: int
    start: int = 0  # first row ("stacked"), or first row inside each head's block ("per_head")
    per_head: int = 0  # rows of one head's block when fused per head, otherwise 0
    output: bool = False  # o_proj: heads are columns

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.per_head:
            blocks = tensor.view(self.heads, self.per_head, *tensor.shape[1:])
            return blocks[:, self.start : self.start + self.head_dim]
        rows = tensor[self.start : self.start + self.heads * self.head_dim]
        return rows.view(self.heads, self.head_dim, *tensor.shape[1:])

    @property
    def like(self) -> torch.Tensor:
        """A weight with the projection's dtype and device."""
        return next(self.module.parameters())

    @property
    def by_head(self) -> torch.Tensor:
        """(heads, d, D), or (heads, D, d) for o: a view, so that writing into it changes the model.

        Unsupported for structured projections, which have no such weight.
        """
        if isinstance(self.module, MonarchLinear):
            raise Unsupported(
                f"projections: {self.module.spec} has no weight by heads; change heads before projections, or "
                "effattn.swap(model, projections='dense') first"
            )
        if self.output:
            return self.module.weight.detach().view(-1, self.heads, self.head_dim).transpose(0, 1)
        return self._rows(self.module.weight.detach())

    @property
    def weight(self) -> torch.Tensor:
        """(heads·d, D), or (D, heads·d) for o. Of structured projections a copy, multiplied out."""
        if isinstance(self.module, MonarchLinear):
            dense = self.module.dense().detach()
            return dense if self.output else self._rows(dense).reshape(self.heads * self.head_dim, -1)
        if self.output:
            return self.module.weight.detach()
        return self.by_head.reshape(self.heads * self.head_dim, -1)

    @property
    def bias(self) -> torch.Tensor | None:
        """(heads·d,), or (D,) for o; None without one."""
        if self.module.bias is None or self.output:
            return None if self.module.bias is None else self.module.bias.detach()
        return self._rows(self.module.bias.detach()).reshape(-1)

    @property
    def with_bias(self) -> torch.Tensor:
        """(heads, d, D + 1): the map of (x, 1), in fp64. A missing bias is a column of zeros. Not for o."""
        weight = self.by_head.double()
        bias = torch.zeros(self.heads * self.head_dim) if self.bias is None else self.bias
        return torch.cat([weight, bias.to(weight).view(self.heads, self.head_dim, 1)], dim=-1)


def set_linear(linear: nn.Linear, with_bias: torch.Tensor) -> None:
    """Writes the map of (x, 1), (rows, D + 1), into a Linear, which may get more or fewer rows."""
    weight, bias = with_bias[:, :-1], with_bias[:, -1]
    old = linear.weight
    linear.weight = nn.Parameter(weight.to(old).contiguous(), requires_grad=old.requires_grad)
    linear.out_features = weight.shape[0]
    if linear.bias is not None:
        grad = linear.bias.requires_grad
        linear.bias = nn.Parameter(bias.to(old).contiguous(), requires_grad=grad)
