"""`aligned`: turn the heads of a group towards each other before taking their mean, then restore
norms.

Generalised Procrustes on activations. For rotary dimensions only a phase per head and frequency
commutes with RoPE; for values, and for dimensions without RoPE, any rotation does. After Jin et al.
2024, "Align Attention Heads Before Merging Them" (arXiv:2412.20677), with the phase restriction
made exact.

n: heads of the group; d: size of a head; R: dimensions that RoPE turns; F = R/2: frequencies; D1:
hidden size + 1, the bias."""

from __future__ import annotations

import torch

from effattn.heads.methods.base import Heads, Merged, Method, register

ROUNDS = 20


def _unturned(heads: Heads) -> Merged:
    """The heads' mean as they are, with the energy of an average head: what is right where neither
    a turn nor a scale of a head can be undone elsewhere, because a norm with gains or a clip stands
    behind the projection."""
    n, d, _ = heads.keys.shape
    same = torch.eye(d, dtype=heads.keys.dtype).expand(
        n,
        d,
        d,
    )
    key, value = (
        maps.mean(0)
        * _restore(
            maps,
            maps.mean(0),
            heads.moment,
        )
        for maps in (heads.keys, heads.values)
    )
    return Merged(key, same, value, same)


# no method that can be asked for: the mean, where it is what is left
unturned = Method("mean", _unturned)


@register(
    rank=1,
    needs_data=True,
    instead=(unturned,),
)
def aligned(heads: Heads) -> Merged:
    """Key phases and value rotations against the group's mean; see the module's docstring."""
    n, d, _ = heads.keys.shape
    key, key_maps = (
        torch.empty_like(heads.keys[0]),
        heads.keys.new_zeros(
            n,
            d,
            d,
        ),
    )
    real, imaginary = heads.pairs
    rest = heads.rest
    # LayerNorm subtracts a mean over the head: no rotation commutes with it
    if heads.normed == "layer":
        real, imaginary, rest = real[:0], imaginary[:0], torch.arange(d)
    if len(real):
        # a pair of rows that RoPE turns by one angle is one complex number, and RoPE is a
        # multiplication
        z = torch.complex(heads.keys[:, real], heads.keys[:, imaginary])  # (n, R/2, D1)
        # (R/2, n)
        turns = _phases(
            torch.einsum(
                "afi,ij,bfj->fab",
                z,
                heads.moment.to(z),
                z.conj(),
            )
        )
        mean = (
            torch.einsum(
                "fa,afi->fi",
                turns,
                z,
            )
            / n
        )
        mean = mean * _restore(
            z,
            mean,
            heads.moment,
            per_row=True,
        )
        key[real], key[imaginary] = mean.real, mean.imag
        write_complex(
            key_maps,
            turns.conj().T,
            real,
            imaginary,
        )  # k_h ~ conj(turn_h) k'
    if len(rest):
        maps = heads.keys[:, rest]
        turns = torch.eye(len(rest), dtype=maps.dtype).expand(
            n,
            -1,
            -1,
        )
        if heads.normed != "layer":
            turns = _rotations(maps, heads.moment)
        mean = (turns @ maps).mean(0)
        key[rest] = mean * _restore(
            maps,
            mean,
            heads.moment,
        )
        key_maps[:, rest[:, None], rest] = turns.transpose(1, 2)
    turns = _rotations(heads.values, heads.moment)
    value = (turns @ heads.values).mean(0)
    value = value * _restore(
        heads.values,
        value,
        heads.moment,
    )
    return Merged(
        key,
        key_maps,
        value,
        turns.transpose(1, 2).contiguous(),
    )


def write_complex(
    maps: torch.Tensor, factors: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor
) -> None:
    """Writes multiplication by complex `factors` (n, R/2) as 2x2 blocks into real maps (n, d,
    d).
    """
    maps[:, real, real] = maps[:, imaginary, imaginary] = factors.real
    maps[:, imaginary, real] = factors.imag
    maps[:, real, imaginary] = -factors.imag


def _phases(covariance: torch.Tensor) -> torch.Tensor:
    """Unit turns c (F, n) that maximise |sum_h c_h z_h|^2, given covariance[f, a, b] = E[z_a
    conj(z_b)].

    Starts from the leading eigenvector, so that the answer does not depend on the heads' gauge.
    """
    turns = _unit(torch.linalg.eigh(covariance).eigenvectors[..., -1].conj())
    turns = turns * turns[:, :1].conj()  # the common phase is free: keep head 0 where it is
    for _ in range(ROUNDS):
        turns = _unit(
            torch.einsum(
                "fa,fab->fb",
                turns,
                covariance,
            )
        )
        turns = turns * turns[:, :1].conj()
    return turns


def _unit(z: torch.Tensor) -> torch.Tensor:
    size = z.abs()
    return torch.where(
        size > 0,
        z / size.clamp_min(1e-300),
        torch.ones_like(z),
    )


def _rotations(maps: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Orthogonal turns (n, r, r) of maps (n, r, D1) towards their common mean; head 0 is the
    start.
    """
    # each round solves orthogonal Procrustes (the SVD of the cross moment) for every head, against
    # the mean of the last one
    target = maps[0]
    for _ in range(ROUNDS):
        u, _, v = torch.linalg.svd(
            torch.einsum(
                "di,ij,hej->hde",
                target,
                moment,
                maps,
            )
        )
        turns = u @ v
        target = (turns @ maps).mean(0)
    return turns


def _restore(
    old: torch.Tensor, mean: torch.Tensor, moment: torch.Tensor, per_row: bool = False
) -> torch.Tensor:
    """The factor that gives the mean of `old` (n, r, D1) their average energy: a scalar, or one a
    row (r, 1).
    """
    # the mean of heads that differ is shorter than they are, and scores would flatten
    moment = moment.to(old)
    before = torch.einsum(
        "hri,ij,hrj->hr",
        old,
        moment,
        old.conj(),
    ).real.mean(0)
    after = torch.einsum(
        "ri,ij,rj->r",
        mean,
        moment,
        mean.conj(),
    ).real
    if not per_row:
        before, after = before.sum(), after.sum()
    factor = (before / after.clamp_min(1e-300)).sqrt()
    return torch.where(
        after > 0,
        factor,
        torch.ones_like(factor),
    ).reshape(-1, 1)
