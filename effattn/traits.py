"""What a backend says of itself: its traits, and the fewest that a call of some shape must do."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Traits:
    """What a backend is.

    exact: equals softmax attention over the keys it may see. causal, bidirectional: the directions
    that it has. learned: whether it has parameters to train, or a codebook to calibrate. state:
    what it remembers while decoding, in words."""

    exact: bool
    causal: bool
    bidirectional: bool
    learned: bool
    state: str


@dataclass(frozen=True)
class Shape:
    """The sizes of one call, as `cost` needs them.

    batch: rows; heads, kv_heads: of queries, of keys and values; queries, keys: tokens, the queries
    being the last of the keys; head_dim, value_dim: of a key, of a value (head_dim by default);
    itemsize: bytes of an element; causal: whether later keys are hidden.

    backward: the backward pass of that call, alone, instead of the forward pass; a training step is
    the sum of both."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int = 0
    itemsize: int = 2
    causal: bool = True
    backward: bool = False

    def __post_init__(self):
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return (
            self.batch
            * self.kv_heads
            * self.keys
            * (self.head_dim + self.value_dim)
            * self.itemsize
        )

    @property
    def query_bytes(self) -> int:
        """Bytes of q."""
        return self.batch * self.heads * self.queries * self.head_dim * self.itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of the output."""
        return self.batch * self.heads * self.queries * self.value_dim * self.itemsize

    @property
    def lse_bytes(self) -> int:
        """Bytes of a softmax's log-sum-exps, which its backward pass starts from: a float32 or
        better per query.
        """
        return self.batch * self.heads * self.queries * max(4, self.itemsize)


@dataclass(frozen=True)
class Cost:
    """The fewest a call must do, of all rows and heads.

    flops: operations in matrix products (a multiply-add is 2). read_bytes, write_bytes: moved from
    and to memory, each tensor once. state_bytes: remembered afterwards. Costs add up."""

    flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    state_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def intensity(self) -> float:
        """FLOP per byte moved; infinite when nothing moves."""
        moved = self.read_bytes + self.write_bytes
        return self.flops / moved if moved else math.inf
