"""Latent keys and values as modules of an attention module: `effattn_latent` and what stands for
its k_proj and v_proj.

c = W_D x is all that a cache remembers of a token; K = W_UK c + b and V = W_UV c + b come of it.
`effattn.heads.latent` finds the matrices.

D: hidden size; Hkv: key/value heads; d: size of one; r: rank, numbers of a latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from effattn.interface import Cost
from effattn.kernels.latent import Latent, Maps
from effattn.projections.base import StructuredLinear
from effattn.specs import format_spec, parse_spec

LATENT_HEADS = "latent"  # the name of their specs


class LatentLinear(StructuredLinear):
    """k_proj or v_proj of a latent layer: x (..., D) -> (..., rows), by way of the latent.

    weight (rows, r), bias (rows,). `down` is a part of the layer's `LatentMemory`, which
    both have in common, and not of this module."""

    def __init__(self, down: nn.Linear, rows: int):
        super().__init__()
        self.spec = format_spec(LATENT_HEADS, {"rank": down.out_features})
        self._down = (down,)  # in a tuple: no child, so that it is saved once
        self.in_features, self.out_features = down.in_features, rows
        self.weight = nn.Parameter(down.weight.new_zeros(rows, down.out_features))
        self.bias = nn.Parameter(down.weight.new_zeros(rows))

    @property
    def down(self) -> nn.Linear:
        """W_D."""
        return self._down[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., rows)."""
        return linear(self.down(x), self.weight, self.bias)

    def cost(self, rows: int, backward: bool = False) -> Cost:
        """Of W_UK or W_UV for the latents of `rows` tokens; those are the memory's business.
        backward: of the backward pass alone, two products."""
        outputs, rank = self.weight.shape
        size = self.weight.element_size()
        c, y, flops = rows * rank * size, rows * outputs * size, 2 * rows * rank * outputs
        weights = (rank + 1) * outputs * size
        if backward:
            return Cost(2 * flops, y + c + rank * outputs * size, c + weights)
        return Cost(flops, c + weights, y)

    def dense(self) -> Tensor:
        """W, (rows, D), of rank r."""
        return self.weight @ self.down.weight

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same, and remembers nothing in common with another."""
        new = nn.Linear(self.in_features, self.out_features, device="meta")
        new.weight = nn.Parameter(self.dense())
        new.bias = self.bias
        return new.train(self.training)

    def extra_repr(self) -> str:
        rank = self.down.out_features
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={rank}"


@dataclass
class Shared:
    """What a step's other modules get of the latents that its first one has made.

    uses: how often the next outputs will be asked for again. kept: (inputs, what is known of them,
    latents, uses left) of the last ones."""

    uses: int = 0
    kept: tuple | None = None

    def __getstate__(self) -> dict:
        return {}  # copies begin anew


class Down(nn.Linear):
    """W_D, whose outputs three modules ask for in a step: they are made once. Inputs are known
    again by the tensor itself and by torch's counts of writes."""

    def __init__(self, hidden: int, rank: int, **options: Any):
        super().__init__(hidden, rank, bias=False, **options)
        self.shared = Shared()  # not of this module: setting a module's attribute takes long

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., r)."""
        shared = self.shared
        uses, shared.uses = shared.uses, 0
        if uses:
            c, shared.kept = linear(x, self.weight), None
            counted = not (x.is_inference() or self.weight.is_inference())
            if counted and not torch.compiler.is_compiling():
                shared.kept = x, self._known(x), c, uses
            return c
        if shared.kept is None:
            return linear(x, self.weight)
        given, known, c, left = shared.kept
        shared.kept = (given, known, c, left - 1) if left > 1 else None
        return c if given is x and known == self._known(x) else linear(x, self.weight)

    def _known(self, x: Tensor) -> tuple:
        return x._version, self.weight._version, self.weight.data_ptr(), torch.is_grad_enabled()


class LatentMemory(nn.Module):
    """What a layer remembers of its tokens: `memory(x)` for x (B, T, D) is the `Latent` that goes
    with a cached call.

    down: W_D, nn.Linear(D, r) without bias."""

    def __init__(self, hidden: int, rank: int, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.down = Down(hidden, rank, device=device, dtype=dtype)
        self._ups: tuple[LatentLinear, ...] = ()
        self._norm: tuple[Callable[[Tensor], Tensor] | None] = (None,)
        self.kv_heads = 0

    def attach(self, k: LatentLinear, v: LatentLinear, kv_heads: int, key_norm=None) -> None:
        """Says which modules make keys and values. key_norm: what keys, (B, Hkv, T, d), go through
        after them; None: nothing."""
        self._ups, self._norm, self.kv_heads = (k, v), (key_norm,), kv_heads

    @property
    def rank(self) -> int:
        """r."""
        return self.down.out_features

    @property
    def spec(self) -> str:
        """The layer's heads, as `describe` shows them and checkpoints hold them."""
        return format_spec(LATENT_HEADS, {"rank": self.rank})

    @property
    def maps(self) -> Maps:
        """The layer's matrices by head."""
        weights = [up.weight.unflatten(0, (self.kv_heads, -1)) for up in self._ups]
        biases = [up.bias.view(self.kv_heads, -1) for up in self._ups]
        return Maps(*weights, *biases, key_norm=self._norm[0])

    def forward(self, x: Tensor) -> Latent:
        """The latents c (B, 1, T, r) of x (B, T, D), with the maps. Keys and values will be asked
        for with the same x."""
        shared = getattr(self.down, "shared", None)  # none: an adapter is around it
        if shared is not None:
            shared.uses = len(self._ups)
        return Latent(self.down(x)[:, None], self.maps)


def check_spec(where: str, spec: object, largest: int) -> int:
    """The rank of a recorded spec. ValueError, beginning with `where`, for any other."""
    try:
        name, options = parse_spec(spec) if isinstance(spec, str) else ("", {})
    except ValueError:
        name, options = "", {}
    rank = options.get("rank")
    if name != LATENT_HEADS or options.keys() != {"rank"} or type(rank) is not int:
        raise ValueError(f"{where}: got {spec!r:.80}, valid is {LATENT_HEADS}(rank=...)")
    if not 0 < rank <= largest:
        raise ValueError(f"{where}: rank: got {rank!r:.40}, valid here is 1 to {largest:,}")
    return rank
