"""The newest tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.states.policies import Policy, register


@register("streaming")
@dataclass(frozen=True)
class Streaming(Policy):
    """The place of a token: the newest stay, and the first ones that the cache keeps anyway
    (StreamingLLM, arXiv:2309.17453, here with every token at its own position)."""

    def score(self, seen):
        place = torch.arange(seen.k.shape[2], dtype=torch.float32, device=seen.k.device)
        return place.expand(seen.real.shape)
