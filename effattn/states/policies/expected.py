"""What later queries are expected to look at stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from effattn.states.policies import Policy, Seen, register


@register("expected")
@dataclass(frozen=True)
class Expected(Policy):
    """The attention that the queries of the next `future` positions are expected to pay to a key,
    times the norm of its value: queries before their rotation are taken for normal, with the mean m
    and covariance C of those that came, and are turned by the mean rotation of those positions, so
    that E exp(q k) = exp(m k + k C k / 2) (Expected Attention, arXiv:2510.00636).

    Queries of the `first` tokens are left out, which are unlike all others; those tokens stay.
    While decoding, m and C are of the `window` newest queries."""

    future: int = 512
    first: int = 4
    window: int = 64

    rotation: ClassVar[bool] = True

    @property
    def queries(self):
        return self.window

    def score(self, seen):
        (batch, heads, _, dim), kv_heads = seen.q.shape, seen.k.shape[1]
        work, group = torch.promote_types(seen.k.dtype, torch.float32), heads // kv_heads
        mean, spread = self._statistics(seen, work)
        k = seen.k.to(work)
        begin = seen.real & (seen.real.cumsum(dim=2) <= self.first)
        asked = (seen.real & ~begin)[:, :, None]
        scores = (mean.view(batch, kv_heads, group, dim) @ k.mT) * seen.scale
        spread = spread.view(batch, kv_heads, group, dim, dim)
        for one in range(group):  # a head's k C k at once, not all of them
            scores[:, :, one] += ((k @ spread[:, :, one]) * k).sum(-1) * (seen.scale**2 / 2)
        shares = scores.masked_fill(~asked, torch.finfo(work).min).softmax(dim=-1)
        found = shares.mean(dim=2) * torch.linalg.vector_norm(seen.v, dim=-1, dtype=work)
        return torch.where(begin, found.amax() + 1, found)

    def _statistics(self, seen: Seen, work: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean (B, Hq, D) and covariance (B, Hq, D, D) of the queries to come."""
        queries, dim = seen.q.shape[2], seen.q.shape[3]
        # by the number of real tokens up to it, a query is one of the first or not
        count = seen.real[:, 0].cumsum(dim=1)[:, -queries:]
        weight = (seen.real[:, 0, -queries:] & (count > self.first)).to(work)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
        q = seen.q.to(work)
        device = q.device
        if seen.rope is not None:  # all as if they stood behind the last token
            q = seen.rope.turn(q, queries - torch.arange(queries, device=device))
        mean = torch.einsum("bhtd,bt->bhd", q, weight)
        centred = q - mean[:, :, None]
        spread = torch.einsum("bhtd,bhte,bt->bhde", centred, centred, weight)
        if seen.rope is not None:
            turned = self._mean_rotation(seen, dim, work, device)
            mean, spread = mean @ turned, turned.mT @ spread @ turned
        return mean, spread

    def _mean_rotation(self, seen: Seen, dim: int, work: torch.dtype, device) -> Tensor:
        """(D, D), which a row is multiplied by: the mean over the `future` next positions."""
        eye = torch.eye(dim, dtype=work, device=device)[None, :, None]
        total = torch.zeros(dim, dim, dtype=work, device=device)
        for low in range(0, self.future, 64):
            places = torch.arange(low, min(low + 64, self.future), device=device)
            total += seen.rope.turn(eye.expand(-1, -1, len(places), -1), places)[0].sum(dim=1)
        return total / self.future
