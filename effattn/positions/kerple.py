"""KERPLE (arXiv:2205.09921): penalties by conditionally positive definite kernels of the distance,
learned per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effattn.errors import check_choice
from effattn.kernels.flash.rules import Bias
from effattn.positions.base import Added, check_number, register

LEAST = 1e-2  # of both numbers, as in the paper's code


@register("kerple")
@dataclass(frozen=True)
class Kerple(Added):
    """KERPLE (arXiv:2205.09921): -r1 log(1 + r2 |i - j|), or -r1 |i - j|^r2 with kind="power" and
    r2 <= 2. r1, r2 > 0: where each head starts.
    """

    kind: str = "log"
    r1: float = 1.0
    r2: float = 1.0

    def __post_init__(self):
        check_choice("kerple: kind", self.kind, ("log", "power"))
        for option in ("r1", "r2"):
            check_number("kerple", option, getattr(self, option), least=LEAST)
        if self.kind == "power" and self.r2 > 2:
            raise ValueError(f"kerple: r2: got {self.r2}, valid for kind='power' is at most 2")

    def new_parameters(self, trained):
        return torch.tensor([[self.r1, self.r2]], dtype=torch.float).repeat(trained.heads, 1)

    def bias(self, trained, tokens, learned):
        # held where the kernels are conditionally positive definite, as in the paper's code
        most = torch.tensor(
            [torch.inf, 2.0 if self.kind == "power" else torch.inf], device=learned.device
        )
        return Bias(f"kerple_{self.kind}", learned.clamp(min=LEAST).minimum(most))
