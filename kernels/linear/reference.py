"""Linear attention by its definition, with every pair of tokens: slow and obvious.

    o_t = sum_j w_tj kappa(q_t, k_j) v_j / sum_j w_tj kappa(q_t, k_j)
    kappa(q, k) = phi(q) . phi(k),  w_tj = decay^(t - j),  j <= t if causal, real keys only

For Performer, log kappa is a log-sum-exp over the features, and attention the softmax of it:
nothing overflows."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import EPSILON


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    *,
    directions: Tensor | None = None,
    mask: Tensor | None = None,
    decay: Tensor | None = None,
    normalize: bool = True,
    causal: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """(B, Hq, Tq, Dv). q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); queries are the
    last keys.

    directions (F, D) of the Performer maps, which estimate exp(scale q k); mask (B, Tk) bool: real
    keys; decay (Hkv,). Without `normalize`, the sum times scale. A query that sees nothing gives 0.
    """
    groups, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)
    seen = (j <= i) if causal else torch.ones_like(j <= i)
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    if directions is not None:
        q, k = q * (abs(scale) ** 0.5 * (-1 if scale < 0 else 1)), k * abs(scale) ** 0.5
    if feature_map == "favor":
        weights = torch.softmax(
            _log_kernel(q, k, directions).masked_fill(~seen, -torch.inf), dim=-1
        )
        return torch.where(seen, weights, 0.0) @ v
    kappa = _features(q, feature_map, directions) @ _features(k, feature_map, directions).mT
    if decay is not None:
        distance = (i - j).clamp(min=0)
        kappa = kappa * decay.to(q).repeat_interleave(groups)[:, None, None] ** distance
    kappa = torch.where(seen, kappa, 0.0)
    if not normalize:
        return kappa @ v * scale
    total = kappa.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, 0.0, kappa @ v / torch.where(total == 0, 1.0, total))


def _log_kernel(q: Tensor, k: Tensor, directions: Tensor) -> Tensor:
    """log(1/m sum_f exp(w q - |q|^2/2) exp(w k - |k|^2/2)): (B, H, Tq, Tk)."""
    w = directions.to(q)
    log_q = q @ w.mT - q.square().sum(-1, keepdim=True) / 2
    log_k = k @ w.mT - k.square().sum(-1, keepdim=True) / 2
    rows = [torch.logsumexp(log_q[:, :, t, None] + log_k, dim=-1) for t in range(q.shape[2])]
    return torch.stack(rows, dim=2) - torch.tensor(float(w.shape[0])).log()


def _features(x: Tensor, feature_map: str, directions: Tensor | None) -> Tensor:
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    if feature_map == "relu":
        return x.clamp(min=0)
    if feature_map == "relu2":
        return x.clamp(min=0) ** 2
    if feature_map == "softmax":
        return torch.softmax(x, dim=-1)
    if feature_map == "favor_relu":
        return (x @ directions.to(x).mT).clamp(min=0) + EPSILON
    return x
