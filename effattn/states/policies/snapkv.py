"""What the newest queries look at stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effattn.states.policies import Policy, Seen, register


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """The attention that the `window` newest queries pay to a key, mean of these and of the group's
    heads, smoothed over `pool` neighbours (SnapKV, arXiv:2404.14469). The window itself stays."""

    window: int = 64
    pool: int = 5

    @property
    def queries(self):
        return self.window

    def score(self, seen):
        queries = min(self.window, seen.q.shape[2])
        mass = torch.stack([_mass(seen, h, queries) for h in range(seen.k.shape[1])], dim=1)
        old = mass.shape[2] - queries
        if not old:
            return torch.zeros_like(mass)
        half = self.pool // 2
        mass[..., :old] = torch.nn.functional.avg_pool1d(
            mass[..., :old], self.pool, stride=1, padding=half
        )[..., :old]
        # the queries' own tokens, which few of the queries see at all
        mass[..., old:] = mass[..., :old].amax() + 1
        return mass


def _mass(seen: Seen, head: int, queries: int) -> Tensor:
    """(B, M): of one K/V head, the mean share of its keys in what the last queries see."""
    work, kv_heads = torch.promote_types(seen.k.dtype, torch.float32), seen.k.shape[1]
    group, tokens = seen.q.shape[1] // kv_heads, seen.k.shape[2]
    q = seen.q[:, head * group : (head + 1) * group, -queries:].to(work)
    scores = q @ seen.k[:, head, None].to(work).mT * seen.scale
    place = torch.arange(tokens, device=q.device)
    later = place > tokens - queries + torch.arange(queries, device=q.device)[:, None]
    hidden = later | ~seen.real[:, head, None, None]
    scores = scores.masked_fill(hidden, torch.finfo(work).min)
    return scores.softmax(dim=-1).masked_fill(hidden, 0.0).mean(dim=(1, 2))
