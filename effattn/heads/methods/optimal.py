"""`optimal`: the fewer heads that lose least, in closed form, whatever gauge the checkpoint is in.

Keys. With RoPE a head is one complex number z per frequency, and scaling it by any complex constant
is undone in the query. The best common key k' and constants a_h for sum_h w_h E|z_h - a_h k'|^2,
with w_h = E|q_h|^2, come from the leading eigenvector u of W^(1/2) C W^(1/2), C = E[z z^H]: k' =
sum_h conj(u_h) sqrt(w_h) z_h and a_h = u_h / sqrt(w_h).

Values, and key dimensions without RoPE. Any matrix is undone in the output (the query): the same
with matrices. With M = blockdiag(O_h^T O_h) and E the d leading eigenvectors of M^(1/2) C M^(1/2):
v' = E^T M^(1/2) [v_h] and v_h ~ M_h^(-1/2) E_h v'.

n: heads of the group; d: size of a head; F: frequencies; r: rows of a head that are merged as
matrices; D1: hidden size + 1, the bias."""

from __future__ import annotations

import torch

from effattn.heads.methods.aligned import aligned, unturned, write_complex
from effattn.heads.methods.base import Heads, Merged, register
from effattn.heads.roots import FLOOR, roots


@register(
    rank=0,
    needs_data=True,
    normed="aligned",
    instead=(aligned, unturned),
)
def optimal(heads: Heads) -> Merged:
    """The merge of least squared error; keys behind a q/k norm fall back to `aligned` (the norm is
    not linear, and only turns may be folded into the queries)."""
    value, value_maps = _low_rank(
        heads.values,
        heads.output,
        heads.moment,
    )
    if heads.normed:
        turned = aligned(heads)
        return Merged(
            turned.key,
            turned.key_maps,
            value,
            value_maps,
        )
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
    if len(real):
        energy = heads.query.diagonal(dim1=1, dim2=2)
        z = torch.complex(heads.keys[:, real], heads.keys[:, imaginary])
        best, factors = _complex_rank_one(
            z,
            energy[:, real] + energy[:, imaginary],
            heads.moment,
        )
        key[real], key[imaginary] = best.real, best.imag
        write_complex(key_maps, factors, real, imaginary)
    rest = heads.rest
    if len(rest):
        query = heads.query[:, rest[:, None], rest]
        key[rest], key_maps[:, rest[:, None], rest] = _low_rank(
            heads.keys[:, rest], query, heads.moment
        )
    return Merged(key, key_maps, value, value_maps)


def _complex_rank_one(
    z: torch.Tensor, weights: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """z (n, F, D1) complex, weights (n, F) -> k' (F, D1), factors a (n, F) with z_h ~ a_h k'."""
    if not weights.any():  # no query looks along any direction: all count the same
        weights = torch.ones_like(weights)
    weights = weights.clamp_min(FLOOR * weights.amax())
    root = weights.sqrt().T  # (F, n)
    covariance = torch.einsum(
        "afi,ij,bfj->fab",
        z,
        moment.to(z),
        z.conj(),
    )
    # (F, n)
    u = torch.linalg.eigh(root[:, :, None] * covariance * root[:, None, :]).eigenvectors[..., -1]
    # The eigenvector's phase is arbitrary: make its largest entry real, so that k' leans on a real
    # head.
    lead = u.gather(1, u.abs().argmax(1, keepdim=True))
    u = u * (lead.conj() / lead.abs())
    best = torch.einsum(
        "fa,afi->fi",
        u.conj() * root,
        z,
    )
    factors = (u / root).T
    # So is the scale: give k' the energy of an average head, as norms, bf16 and quantizers expect.
    energy = torch.einsum(
        "fi,ij,fj->f",
        best,
        moment.to(z),
        best.conj(),
    ).real
    old = covariance.diagonal(dim1=1, dim2=2).real.mean(1)
    size = torch.where(
        (energy > 0) & (old > 0), (old / energy.clamp_min(1e-300)).sqrt(), torch.ones_like(energy)
    )
    return best * size[:, None], factors / size


def _low_rank(
    maps: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """maps (n, r, D1), weight (n, r, r) -> common map (r, D1), stand-ins (n, r, r) with m_h ~ B_h
    m'.
    """
    n, r, width = maps.shape
    if not weight.any():
        weight = torch.eye(r, dtype=weight.dtype).expand(
            n,
            r,
            r,
        )
    root, inverse = roots(weight)
    scaled = (root @ maps).reshape(n * r, width)
    vectors = torch.linalg.eigh(scaled @ moment @ scaled.T).eigenvectors[:, -r:]  # (n·r, r)
    common = vectors.T @ scaled
    stand_ins = inverse @ vectors.view(
        n,
        r,
        r,
    )
    # Any invertible r x r matrix is free here. Take the rotation and the scale that bring the
    # result closest to the first head, so that fine-tuning and quantizers meet weights of the usual
    # shape.
    u, _, v = torch.linalg.svd(maps[0] @ moment @ common.T)
    turn = u @ v
    energy = torch.einsum(
        "ri,ij,rj->",
        common,
        moment,
        common,
    )
    old = (
        torch.einsum(
            "hri,ij,hrj->",
            maps,
            moment,
            maps,
        )
        / n
    )
    size = (old / energy).sqrt() if energy > 0 and old > 0 else torch.ones(())
    return size * turn @ common, stand_ins @ turn.T / size
