"""The Monarch matrix closest to a dense one: truncated SVDs of its blocks.

The submatrix of output block j and input block i is free of all others but for its rank, so that
the closest Monarch matrix has the closest matrix of that rank in every block (Dao et al. 2022,
arXiv:2204.00595, algorithm 1), by Eckart-Young. Closest in its outputs, E|W x - M x|^2 for inputs
of second moment E[x x^T], the input blocks of one row depend on each other: they are solved in
turn, each exactly, given the others.

    b blocks, r rank
    W_ji (s, p): the submatrix of outputs j, j + b, j + 2b, … and inputs i·p to (i + 1)·p
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from effattn.damping import damped

SWEEPS = 4  # over all input blocks; the error never grows, and little is left to gain after a few


@torch.no_grad()
def project(
    weight: Tensor, blocks: int, rank: int, moment: Tensor | None = None, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """right (b, b·r, p) and left (b, s, b·r) of the Monarch matrix closest to weight (out, in), in
    fp64.

    moment (in, in): second moment of the inputs, E[x x^T], `damped`; None: closest in
    the Frobenius norm, which is also where the other begins. Both factors get the roots of the
    singular values. Padding of the weight is zero rows and columns."""
    w = _blocks(weight.double(), blocks)
    out, inside = _truncated(w, rank)
    if moment is None:
        return _factors(out, inside)
    # Closest in its outputs: E|(W - M) x|^2 = tr((W - M) S (W - M)^T), S the second moment.
    p = w.shape[3]
    missing = blocks * p - len(moment)
    # Damped as noise on the inputs would: they are not those of the calibration once other layers
    # are projected too, and without it directions that hardly vary get huge weights (embedded
    # model, 8 blocks, 32,768 tokens: perplexity 47 without, 19.7 at 0.1, 20.4 at 0.5). Padding
    # counts as 1.
    moment = damped(pad(moment.to(w), (0, missing, 0, missing)))
    values, vectors = torch.linalg.eigh(
        moment.view(blocks, p, blocks, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )
    # each input block's own moment ** -0.5, (b, p, p)
    whiten = (vectors / values.sqrt()[:, None]) @ vectors.mT
    rows = rearrange(w, "j i s p -> j s (i p)")  # of each output block
    m = rearrange(out @ inside, "j i s p -> j s (i p)")
    for _ in range(sweeps):
        for i in range(blocks):
            at = slice(i * p, (i + 1) * p)
            # What the other input blocks leave of W is fitted by this one. Of any rank the best is
            # (rows - m) S[:, i] S[i, i]^-1; of rank r, its truncation in the metric of its inputs,
            # S[i, i]^(1/2), which is taken off again behind.
            m[..., at] = 0
            out[:, i], inside[:, i] = _truncated((rows - m) @ moment[:, at] @ whiten[i], rank)
            inside[:, i] = inside[:, i] @ whiten[i]
            m[..., at] = out[:, i] @ inside[:, i]
    return _factors(out, inside)


def _blocks(weight: Tensor, blocks: int) -> Tensor:
    """(out, in) -> (j, i, s, p), padded with zeros."""
    rows, columns = weight.shape
    weight = pad(weight, (0, -columns % blocks, 0, -rows % blocks))
    # output t of block j is row t·b + j; inputs are in order
    return rearrange(weight, "(s j) (i p) -> j i s p", j=blocks, i=blocks)


def _truncated(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(..., s, r) and (..., r, p) whose product is the closest to w (..., s, p); each has the roots
    of the values.
    """
    u, values, v = torch.linalg.svd(w, full_matrices=False)
    roots = values[..., :rank].sqrt()
    return u[..., :rank] * roots[..., None, :], roots[..., None] * v[..., :rank, :]


def _factors(out: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """out (j, i, s, r) and inside (j, i, r, p) as the blocks of L and R."""
    right = rearrange(inside, "j i r p -> i (j r) p")
    return right, rearrange(out, "j i s r -> j s (i r)")
