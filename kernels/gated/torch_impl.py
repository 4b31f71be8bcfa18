"""Gated linear attention and the gated delta rule in plain torch: chunks of tokens, all at once but
for one small product a chunk, which hands the sums on. Never T x T, never the sums of every token.

With S the sums before a chunk and G_i the log decay of its tokens up to and with i, what a token
adds is k_i u_i^T, where u = v, or with the delta rule

    u_i = beta_i (v_i - (k_i e^G_i) S - sum_{j<i} (k_i e^(G_i - G_j) . k_j) u_j)

which is one triangular system a chunk (the WY form of arXiv:2406.06484, section 3.2): u = U - W S.

    o_i = (q_i e^G_i) S + sum_{j<=i} (q_i e^(G_i - G_j) . k_j) u_j

B: rows; H: key/value heads; R: query heads of one; N: chunks; C: tokens of one; F: features; V: of
a value, with one more column for the normaliser; E: 1, or F with a decay for every feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..linear.torch_parts import NOTHING, joined
from .gates import BY_FEATURE, CHUNK, HALF

# Of a long sequence so many tokens' products are there at a time. With gradients they are made
# again.
SEGMENT = 2048


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    beta: Tensor | None,
    normalize: bool,
    mask: Tensor | None,
    scale: float,
    memory: tuple[Tensor, Tensor | None, Tensor | None] | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`effattn.kernels.gated.attention`: out, and with `keep` the sums and norms."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v, gates, beta = _prepared(k, v, log_decay, beta, normalize, mask, dtype)
    wide = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (B, H, R, Tq, F)
    if memory is None:
        sums = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    else:
        sums = joined(memory[0], memory[1]).to(dtype)
    out, sums = _segments(wide, k, v, gates, beta, sums)
    if normalize:
        out = _shared(out)
    elif scale != 1:
        out = out * scale
    out = out.flatten(1, 2).to(q.dtype)
    if not keep:
        return out, None, None
    if not normalize:
        return out, sums, None
    return out, sums[..., :-1].contiguous(), sums[..., -1].contiguous()


def _shared(out: Tensor) -> Tensor:
    """out (..., V + 1), the normaliser last -> (..., V); 0 where so little was seen that it counts
    as nothing."""
    total = out[..., -1:]
    nothing = total.abs() < NOTHING * torch.finfo(total.dtype).tiny
    return (out[..., :-1] / total.masked_fill(nothing, 1)).masked_fill(nothing, 0)


def _prepared(k, v, log_decay, beta, normalize: bool, mask: Tensor | None, dtype: torch.dtype):
    """Everything in `dtype`, padding as tokens that change nothing, and the normaliser's values."""
    k, v = k.to(dtype), v.to(dtype)
    gates = k.new_zeros(*k.shape[:3], 1) if log_decay is None else log_decay.to(dtype)
    beta = None if beta is None else beta.to(dtype)
    if mask is not None:  # what padding holds may be anything, NaN too
        hidden = ~mask[:, None, :, None]
        k, v, gates = (x.masked_fill(hidden, 0) for x in (k, v, gates))
        beta = None if beta is None else beta.masked_fill(hidden[..., 0], 0)
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    return k, v, gates, beta


def _segments(q, k, v, gates, beta, sums: Tensor) -> tuple[Tensor, Tensor]:
    """`_chunks`, for so many tokens at a time that their products have room."""
    queries, tokens = q.shape[3], k.shape[2]
    learning = torch.is_grad_enabled() and tokens > SEGMENT
    outs = []
    for low in range(0, tokens, SEGMENT):
        part = slice(low, low + SEGMENT)
        # queries are the last tokens, so a segment may have none, or only its last ones
        first = tokens - queries
        asked = slice(max(0, low - first), max(0, min(low + SEGMENT, tokens) - first))
        given = (
            q[:, :, :, asked],
            k[:, :, part],
            v[:, :, part],
            gates[:, :, part],
            None if beta is None else beta[:, :, part],
            sums,
        )
        out, sums = (
            checkpoint(_chunks, *given, use_reentrant=False) if learning else _chunks(*given)
        )
        outs.append(out)
    if not outs:
        return q.new_zeros(*q.shape[:4], v.shape[3]), sums
    return torch.cat(outs, dim=3) if len(outs) > 1 else outs[0], sums


def _chunks(q, k, v, gates, beta, sums: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, H, R, Tq, V) of q (B, H, R, Tq, F), and the sums (B, H, F, V) after all tokens."""
    tokens, queries = k.shape[2], q.shape[3]
    by_feature = gates.shape[3] > 1
    size = min(BY_FEATURE if by_feature else CHUNK, tokens)
    # tokens behind the last: no key, no decay
    k, v, gates = (_chunked(x, size) for x in (k, v, gates))
    near = gates.cumsum(dim=3)  # G: (B, H, N, C, E)
    last = near[:, :, :, -1:]
    if by_feature:
        left, right = _halves(near)
        pair = None
    else:
        left = right = None
        pair = _pair_decays(near[..., 0])
    kept = k * (last - near).exp()  # what is left of each key at the chunk's end
    if beta is not None:
        beta = _chunked(beta[..., None], size)
        grown = k * near.exp()
        inner = _scores(k, k, left, right, pair) * beta
        system = torch.cat([v * beta, grown * beta], dim=-1)
        solved = torch.linalg.solve_triangular(
            inner.tril(-1), system, upper=False, unitriangular=True
        )
        v, known = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    starts, values = [], []
    for number, decay in enumerate(last.exp().mT.unbind(2)):  # (B, H, E, 1)
        starts.append(sums)
        value = v[:, :, number]
        if beta is not None:
            value = value - known[:, :, number] @ sums
            values.append(value)
        sums = decay * sums + kept[:, :, number].mT @ value
    if beta is not None:
        v = torch.stack(values, dim=2)
    if not queries:
        return q.new_zeros(*q.shape[:4], v.shape[-1]), sums
    # Queries in front of the first one ask for nothing: what they get is cut off.
    q = _chunked(F.pad(q, (0, 0, tokens - queries, 0)), size)  # (B, H, R, N, C, F)
    widened = [None if x is None else x[:, :, None] for x in (k, left, right, pair)]
    scores = _scores(q, *widened).tril()
    before = torch.stack(starts, dim=2)[:, :, None]
    out = scores @ v[:, :, None] + (q * near[:, :, None].exp()) @ before
    return out.flatten(3, 4)[:, :, :, tokens - queries : tokens], sums


def _chunked(x: Tensor, size: int) -> Tensor:
    """(..., T, D) -> (..., N, size, D), zeros behind the last token."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def _pair_decays(near: Tensor) -> Tensor:
    """e^(G_i - G_j) of G (..., C): (..., C, C), 1 where j is later."""
    return (near[..., :, None] - near[..., None, :]).clamp(max=0).exp()


def _halves(near: Tensor) -> tuple[Tensor, Tensor]:
    """e^G_i and e^-G_j, (..., C, F) each, times a power of two that is in neither's product: that
    is the decay between two tokens, and no factor leaves fp32's range."""
    return near.exp() * HALF, (-near).exp() / HALF


def _scores(x: Tensor, k: Tensor, left, right, pair: Tensor | None) -> Tensor:
    """x_i . k_j with the decay between them, (..., C, C); anything where j is later."""
    if pair is None:
        return (x * left) @ (k * right).mT
    return (x @ k.mT) * pair
