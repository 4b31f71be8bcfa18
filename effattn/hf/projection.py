"""q, k, v or o of one attention layer, by head: views of the model's own weights, also where they
are fused.

D: the hidden size; d: of a head; heads: of this projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from effattn.errors import Unsupported
from effattn.hf.weights import is_packed, is_plain, is_transposed, matrix
from effattn.projections.base import StructuredLinear


@dataclass(frozen=True)
class Projection:
    """q, k, v or o of one layer. For fused modules, a view of its rows."""

    module: nn.Linear | StructuredLinear
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
        return next(chain(self.module.parameters(), self.module.buffers()))

    @property
    def by_head(self) -> torch.Tensor:
        """(heads, d, D), or (heads, D, d) for o: a view, so that writing into it changes the model.

        Unsupported for structured projections and packed ones (bitsandbytes), which have no such
        weight."""
        if is_packed(self.module):
            raise Unsupported(
                "projections: the weights are packed in 4 or 8 bits, there are no numbers to read "
                "or write; do this to the model's own weights, before they are quantized"
            )
        if isinstance(self.module, StructuredLinear):
            raise Unsupported(
                f"projections: {self.module.spec} has no weight by heads; change heads before "
                "projections are replaced or packed, or effattn.swap(model, projections='dense') "
                "first"
            )
        if not is_plain(self.module) and not is_transposed(self.module):
            raise Unsupported(
                f"projections: {type(self.module).__name__} is no plain linear layer, its weight "
                "is not all that it computes with; do this to the model's own weights"
            )
        if self.output:
            return matrix(self.module).view(-1, self.heads, self.head_dim).transpose(0, 1)
        return self._rows(matrix(self.module))

    def rows(self, heads: torch.Tensor) -> torch.Tensor:
        """Which rows of the module's weight (columns, for o) belong to these heads (n,): int64
        (n·d,), in their order.

        Unsupported for structured projections, which have no such weight.
        """
        self.by_head  # noqa: B018 - raises where there is none
        rows = torch.arange(matrix(self.module).shape[1 if self.output else 0])
        by_head = rows.view(self.heads, self.head_dim) if self.output else self._rows(rows)
        return by_head[heads].flatten()

    @property
    def weight(self) -> torch.Tensor:
        """(heads·d, D), or (D, heads·d) for o. Of structured projections a copy, multiplied out."""
        if isinstance(self.module, StructuredLinear):
            dense = self.module.dense().detach()
            return (
                dense if self.output else self._rows(dense).reshape(self.heads * self.head_dim, -1)
            )
        if self.output:
            self.by_head  # noqa: B018 - raises where there is none
            return matrix(self.module)
        return self.by_head.reshape(self.heads * self.head_dim, -1)

    @property
    def bias(self) -> torch.Tensor | None:
        """(heads·d,), or (D,) for o; None without one."""
        if self.module.bias is None or self.output:
            return None if self.module.bias is None else self.module.bias.detach()
        return self._rows(self.module.bias.detach()).reshape(-1)

    @property
    def bias_by_head(self) -> torch.Tensor | None:
        """(heads, d): a view, so that writing into it changes the model; None without one. Not for
        o.
        """
        return None if self.module.bias is None else self._rows(self.module.bias.detach())

    @property
    def with_bias(self) -> torch.Tensor:
        """(heads, d, D + 1): the map of (x, 1), in fp64. A missing bias is a column of zeros. Not
        for o.
        """
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
