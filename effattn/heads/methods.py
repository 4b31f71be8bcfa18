"""What merging key/value heads means, and the baselines: mean, first, random.

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
        return torch.einsum("adi,ij,bej->adbe", maps, self.moment, maps)


@dataclass
class Merged:
    """One group: key and value maps (d, D1), and what stands in for its n heads: A, B (n, d, d)."""

    key: torch.Tensor
    key_maps: torch.Tensor
    value: torch.Tensor
    value_maps: torch.Tensor


Method = Callable[[Heads], Merged]


def _plain(heads: Heads, key: torch.Tensor, value: torch.Tensor) -> Merged:
    n, d, _ = heads.keys.shape
    same = torch.eye(d, dtype=heads.keys.dtype).expand(n, d, d)
    return Merged(key, same, value, same)


def mean(heads: Heads) -> Merged:
    """The mean of the group's weights (Ainslie et al. 2023, arXiv:2305.13245, the paper's
    choice).
    """
    return _plain(heads, heads.keys.mean(0), heads.values.mean(0))


def first(heads: Heads) -> Merged:
    """The group's first head (the same paper's second baseline)."""
    return _plain(heads, heads.keys[0], heads.values[0])


def random(heads: Heads) -> Merged:
    """Fresh random heads with the standard deviation of the old weights (the paper's third
    baseline).
    """
    generator = torch.Generator().manual_seed(heads.seed)

    def draw(maps: torch.Tensor) -> torch.Tensor:
        fresh = (
            torch.randn(maps.shape[1:], generator=generator, dtype=maps.dtype)
            * maps[..., :-1].std()
        )
        fresh[..., -1] = 0
        return fresh

    return _plain(heads, draw(heads.keys), draw(heads.values))


def relative_errors(heads: Heads, merged: Merged) -> tuple[float, float]:
    """What merging loses, as shares of the squared norm: of the keys as the queries see them, and
    of the values as the output projection sees them. 0 is lossless, 1 is as bad as writing
    zeros."""

    def share(maps, new, stand_ins, weight):
        lost = maps - stand_ins @ new
        inner = torch.einsum("hdi,ij,hej->hde", lost, heads.moment, lost)
        whole = torch.einsum("hdi,ij,hej->hde", maps, heads.moment, maps)
        return float((inner * weight).sum() / (whole * weight).sum().clamp_min(1e-300))

    return (
        share(heads.keys, merged.key, merged.key_maps, heads.query),
        share(heads.values, merged.value, merged.value_maps, heads.output),
    )
