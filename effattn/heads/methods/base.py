"""What merging key/value heads means, and what a method says of itself.

A method sees one layer as linear maps and their second moments, and returns fewer key and value
maps with, for every old head, the matrix that stands in for it:

    k_h ~ A_h k'_g      so that the new query map is A_h^T q_h
    v_h ~ B_h v'_g      so that the new output map is O_h B_h

Shapes: K old KV heads, G new ones, n = K / G heads a group, d head size, D1 = hidden size + 1 (the
bias)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass
class Heads:
    """One attention layer, as a method sees it; all fp64.

    keys, values (K, d, D1); moment E[(x,1)(x,1)^T] (D1, D1); query (K, d, d): E[q q^T] summed over
    the query heads of each KV head; output (K, d, d): O_h^T O_h summed likewise; pairs: the row
    indices of the real and of the imaginary part of each rotary frequency; `normed`: "rms" or
    "layer" when keys are normalised after the projection, so that only rotations, or nothing, may
    be folded into queries."""

    keys: torch.Tensor
    values: torch.Tensor
    moment: torch.Tensor
    query: torch.Tensor
    output: torch.Tensor
    pairs: tuple[torch.Tensor, torch.Tensor]
    normed: str | None = None
    seed: int = 0

    def select(self, heads: Sequence[int]) -> Heads:
        """The heads of these numbers only."""
        index = torch.as_tensor(list(heads))
        return Heads(
            self.keys[index],
            self.values[index],
            self.moment,
            self.query[index],
            self.output[index],
            self.pairs,
            self.normed,
            self.seed + int(index[0]),
        )

    @property
    def rest(self) -> torch.Tensor:
        """The rows of a head that RoPE does not turn."""
        turned = torch.zeros(self.keys.shape[1], dtype=torch.bool)
        turned[torch.cat(self.pairs)] = True
        return (~turned).nonzero().flatten()

    def covariance(self, maps: torch.Tensor) -> torch.Tensor:
        """E[(w_a x)(w_b x)^T] between all heads of maps (n, d, D1): (n, d, n, d)."""
        return torch.einsum(
            "adi,ij,bej->adbe",
            maps,
            self.moment,
            maps,
        )


@dataclass
class Merged:
    """One group: key and value maps (d, D1), and what stands in for its n heads: A, B (n, d, d)."""

    key: torch.Tensor
    key_maps: torch.Tensor
    value: torch.Tensor
    value_maps: torch.Tensor


@dataclass(frozen=True)
class Method:
    """A way to merge the heads of a group: `METHODS["mean"](heads)`.

    rank: its place where methods are listed, the best first. needs_data: whether it means nothing
    without calibration tokens. normed: the method whose keys it has behind a q/k norm, where that
    is another one. instead: what is tried beside it where a norm with gains or a clip stands behind
    the projections (`effattn.heads.judged`)."""

    name: str
    merge: Callable[[Heads], Merged]
    rank: int = 0
    needs_data: bool = False
    normed: str | None = None
    instead: tuple[Method, ...] = ()

    def __call__(self, heads: Heads) -> Merged:
        return self.merge(heads)

    def key_name(self, has_key_norm: bool) -> str:
        """The method that makes its keys."""
        return self.normed if has_key_norm and self.normed else self.name


REGISTERED: dict[str, Method] = {}


def register(**facts) -> Callable[[Callable[[Heads], Merged]], Method]:
    """Decorator: makes a function a `Method` under its own name. `facts`: the other fields."""

    def add(merge: Callable[[Heads], Merged]) -> Method:
        if merge.__name__ in REGISTERED:
            raise ValueError(f"head method {merge.__name__!r} is registered already")
        method = REGISTERED[merge.__name__] = Method(
            merge.__name__,
            merge,
            **facts,
        )
        return method

    return add


def relative_errors(heads: Heads, merged: Merged) -> tuple[float, float]:
    """What merging loses, as shares of the squared norm: of the keys as the queries see them, and
    of the values as the output projection sees them. 0 is lossless, 1 is as bad as writing
    zeros."""

    def share(maps, new, stand_ins, weight):
        lost = maps - stand_ins @ new
        inner = torch.einsum(
            "hdi,ij,hej->hde",
            lost,
            heads.moment,
            lost,
        )
        whole = torch.einsum(
            "hdi,ij,hej->hde",
            maps,
            heads.moment,
            maps,
        )
        return float((inner * weight).sum() / (whole * weight).sum().clamp_min(1e-300))

    return (
        share(
            heads.keys,
            merged.key,
            merged.key_maps,
            heads.query,
        ),
        share(
            heads.values,
            merged.value,
            merged.value_maps,
            heads.output,
        ),
    )
