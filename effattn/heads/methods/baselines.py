"""The baselines of Ainslie et al. 2023 (arXiv:2305.13245): mean, first, random."""

from __future__ import annotations

import torch

from effattn.heads.methods.base import Heads, Merged, register


def _plain(heads: Heads, key: torch.Tensor, value: torch.Tensor) -> Merged:
    n, d, _ = heads.keys.shape
    same = torch.eye(d, dtype=heads.keys.dtype).expand(
        n,
        d,
        d,
    )
    return Merged(key, same, value, same)


@register(rank=2)
def mean(heads: Heads) -> Merged:
    """The mean of the group's weights (Ainslie et al. 2023, arXiv:2305.13245, the paper's
    choice).
    """
    return _plain(
        heads,
        heads.keys.mean(0),
        heads.values.mean(0),
    )


@register(rank=3)
def first(heads: Heads) -> Merged:
    """The group's first head (the same paper's second baseline)."""
    return _plain(
        heads,
        heads.keys[0],
        heads.values[0],
    )


@register(rank=4)
def random(heads: Heads) -> Merged:
    """Fresh random heads with the standard deviation of the old weights (the paper's third
    baseline).
    """
    generator = torch.Generator().manual_seed(heads.seed)

    def draw(maps: torch.Tensor) -> torch.Tensor:
        fresh = (
            torch.randn(
                maps.shape[1:],
                generator=generator,
                dtype=maps.dtype,
            )
            * maps[..., :-1].std()
        )
        fresh[..., -1] = 0
        return fresh

    return _plain(
        heads,
        draw(heads.keys),
        draw(heads.values),
    )
