"""Which of a layer's keys keep their position, in dimensions that all heads share.

Two dimensions that RoPE turns together are one complex number z = k_real + i k_imaginary of each
key/value head, which e^(i theta j) turns. Numbers of one frequency may be mixed across heads by any
complex matrix before they turn: of the n = K m numbers of m neighbouring frequencies (all taken for
the first of them), the c that all queries' scores depend on most are

    s = U^H W^1/2 z,    U the leading eigenvectors of W^1/2 E[z z^H] W^1/2,    W = E|q|^2

and a query reads them by q' = conj(W^-1/2 U) q. What they leave out of z,
z - W^-1/2 U U^H W^1/2 z, loses its position (`Shared.rest`).

With c = K, and m = 1, nothing is left out. K: key/value heads; d: size of a head; F = d/2
frequencies; P: pairs kept; D1: hidden size + 1, the bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.calibration.statistics import query_energy
from effattn.hf.anatomy import Layer

FLOOR = 1e-9  # of the largest energy of queries: less counts as so much
# Distances at which a number without position has to do: 0 to so many tokens, each weighed by
# 1 / (1 + distance), since attention falls about so.
FAR = 512


@dataclass(frozen=True)
class Kept:
    """How many pairs keep their position, of a head with F frequencies: `fold` neighbouring ones
    share `each`. Either is 1."""

    fold: int
    each: int

    def pairs(self, frequencies: int) -> int:
        """P."""
        return frequencies // self.fold * self.each


def valid(frequencies: int, kv_heads: int) -> dict[int, Kept]:
    """rope_dim -> what it means, in a model with such heads."""
    found = {}
    for fold in range(frequencies, 0, -1):
        if frequencies % fold == 0:
            found[2 * frequencies // fold] = Kept(fold, 1)
    for each in range(2, kv_heads + 1):
        found[2 * frequencies * each] = Kept(1, each)
    return found


@dataclass(frozen=True)
class Shared:
    """A layer's keys in two parts, fp64. key (P, D1) complex: what turns. inv_freq (P,): by which.
    query (K, F, P) complex: q'_p = sum_f query_fp q_f. rest (K, d, D1): keys without position.
    mean (F,) complex: what a query's pair is multiplied by where it reads these."""

    key: Tensor
    inv_freq: Tensor
    query: Tensor
    rest: Tensor
    mean: Tensor


def shared(layer: Layer, moment: Tensor, inv_freq: Tensor, kept: Kept) -> Shared:
    """Of a layer with inputs of E[(x, 1)(x, 1)^T] = moment (D1, D1), fp64. inv_freq (F,): its
    rotation's."""
    keys, (real, imaginary) = layer.k.with_bias.to(moment), layer.rotary_pairs()
    z = torch.complex(keys[:, real], keys[:, imaginary])  # (K, F, D1)
    energy = query_energy(layer, moment).diagonal(dim1=1, dim2=2)
    weights = energy[:, real] + energy[:, imaginary]  # (K, F)
    heads, frequencies, _ = z.shape
    groups = frequencies // kept.fold
    turned, read, rest = [], z.new_zeros(heads, frequencies, groups * kept.each), z.clone()
    for group in range(groups):
        at = slice(group * kept.fold, (group + 1) * kept.fold)
        some, weight = z[:, at].flatten(0, 1), weights[:, at].flatten()
        root = weight.clamp_min(max(FLOOR * float(weight.max()), 1e-300)).sqrt()
        weighed = root[:, None] * some
        _, vectors = torch.linalg.eigh(weighed @ moment.to(z.dtype) @ weighed.mH)
        best = vectors[:, -kept.each :].flip(1)
        own = best.mH @ weighed
        back = best / root[:, None]
        turned.append(own)
        pairs = slice(group * kept.each, (group + 1) * kept.each)
        read[:, at, pairs] = back.conj().unflatten(0, (heads, -1))
        rest[:, at] -= (back @ own).unflatten(0, (heads, -1))
    if kept.each == heads and kept.fold == 1:
        rest.zero_()  # what is left is rounding
    remaining = keys.clone()
    remaining[:, real], remaining[:, imaginary] = rest.real, rest.imag
    inv_freq = inv_freq.to(moment)
    return Shared(
        torch.cat(turned),
        inv_freq[:: kept.fold].repeat_interleave(kept.each),
        read,
        remaining,
        _mean_turn(inv_freq),
    )


def _mean_turn(inv_freq: Tensor) -> Tensor:
    """E[e^(i theta distance)], complex (F,)."""
    distance = torch.arange(FAR, device=inv_freq.device, dtype=inv_freq.dtype)
    likely = 1 / (1 + distance)
    angle = distance[:, None] * inv_freq
    return (torch.polar(torch.ones_like(angle), angle) * likely[:, None]).sum(0) / likely.sum()
