"""Keys of a small norm stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.states.policies import Policy, register


@register("norm")
@dataclass(frozen=True)
class Norm(Policy):
    """Minus the L2 norm of a key: keys of a small norm get much attention (Devoto et al., A Simple
    and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv:2406.11430)."""

    def score(self, seen):
        work = torch.promote_types(seen.k.dtype, torch.float32)
        return -torch.linalg.vector_norm(seen.k, dim=-1, dtype=work)
