"""LongRoPE (arXiv:2402.13753): a factor for every frequency, found by a search; one set for long
sequences, one for those within the trained length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effattn.positions.base import Scaled, check_count, check_number, register


@register("longrope")
@dataclass(frozen=True)
class LongRope(Scaled):
    """LongRoPE (arXiv:2402.13753): theta_i / long_i for sequences beyond the trained length T,
    theta_i / short_i up to it; cos and sin times sqrt(1 + ln s / ln T). long_factor, short_factor:
    R/2 numbers each; short_factor: ones if not given.

    As with `dynamic_ntk`, the length so far decides for all keys, and cached keys are raw.

    search: that many candidates are to be tried for long_factor, which `effattn extend` does; what
    it finds stands in its place, and a model is given that.
    """

    long_factor: tuple[float, ...] | list[float] = ()
    short_factor: tuple[float, ...] | list[float] = ()
    search: int = 0
    varies = True

    def __post_init__(self):
        check_count("longrope", "search", self.search, least=0)
        super().__post_init__()
        if self.search and self.long_factor:
            raise ValueError("longrope: got long_factor and search, which is to find it; give one")
        if self.long_factor in ((), []) and not self.search:
            raise ValueError(
                f"longrope: long_factor: got {self.long_factor!r} with search={self.search}; valid "
                "is a list of numbers, one for each frequency, or a search of at least 1, which "
                "finds them"
            )
        for option in ("long_factor", "short_factor"):
            value = getattr(self, option)
            if not isinstance(value, list | tuple):
                raise ValueError(
                    f"longrope: {option}: got {value!r}, valid is a list of numbers, one for each "
                    "frequency"
                )
            for number in value:
                check_number("longrope", option, number, above=True)

    def check(self, trained):
        super().check(trained)
        if self.search:
            raise ValueError(
                f"longrope: search: got {self.search}, and no factors are found yet; "
                f"`effattn extend --rule 'longrope(length=..., search={self.search})'` finds them; "
                "valid here is long_factor=[...]"
            )
        for option in ("long_factor", "short_factor"):
            if len(value := getattr(self, option)) not in ({trained.dims // 2, 0}):
                raise ValueError(
                    f"longrope: {option}: got {len(value)} numbers, valid is {trained.dims // 2}"
                )

    def frequencies(self, trained, length=None):
        long = torch.tensor(self.long_factor, dtype=torch.float)
        short = torch.tensor(self.short_factor or [1.0] * len(long), dtype=torch.float)
        # one set for all of a sequence, by its length so far; rows may differ
        if isinstance(length, torch.Tensor):
            use_long = (length > trained.length)[:, None]
            factors = torch.where(use_long, long.to(length.device), short.to(length.device))
        else:
            factors = long if length is not None and length > trained.length else short
        return trained.thetas().to(factors.device) / factors, self._scaling(trained)

    def _scaling(self, trained) -> float:
        return math.sqrt(1 + math.log(self.scale(trained)) / math.log(trained.length))

    def parameters(self, trained):
        return {
            "rope_type": "longrope",
            "rope_theta": trained.base,
            "factor": self.scale(trained),
            "original_max_position_embeddings": trained.length,
            "long_factor": list(self.long_factor),
            "short_factor": list(self.short_factor or [1.0] * len(self.long_factor)),
        }
