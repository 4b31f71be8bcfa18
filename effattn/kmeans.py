"""k-means with k-means++ seeding (Arthur & Vassilvitskii 2007), for several heads at once.

H: heads, each with its own centres; N: rows; D: their size."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.kernels import vq

SEEDING = 16  # rows per centre that seeding looks at: it takes one pass for each centre


def kmeans(
    rows: Tensor, centres: int, iterations: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """rows (H, N, D) float -> centres (H, centres, D) and how many rows each one has, (H, centres),
    in the rows' dtype; N >= centres.

    `draw` is a CPU generator; the result depends on nothing else. A centre that loses its rows
    stays where it is."""
    words = _seed(rows, centres, draw)
    for _ in range(iterations):
        codes = vq.nearest(rows[None], words, impl="torch")
        sums, counts = (
            x[0, :, 0] for x in vq.summarise(rows[None], codes, words=centres, impl="torch")
        )
        words = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], words)
    codes = vq.nearest(rows[None], words, impl="torch")
    return words, vq.summarise(rows[None], codes, words=centres, impl="torch")[1][0, :, 0].to(
        words.dtype
    )


def _seed(rows: Tensor, centres: int, draw: torch.Generator) -> Tensor:
    """Each next centre is a row, drawn with a probability in proportion to its square distance from
    those so far.
    """
    heads, count, _ = rows.shape
    some = torch.randperm(count, generator=draw)[: max(centres, min(count, SEEDING * centres))]
    rows = rows[:, some.to(rows.device)]
    head = torch.arange(heads, device=rows.device)
    chosen = [rows[:, 0]]
    distances = torch.full(rows.shape[:2], torch.inf, dtype=rows.dtype, device=rows.device)
    for _ in range(centres - 1):
        distances = torch.minimum(distances, (rows - chosen[-1][:, None]).square().sum(-1))
        # else all rows are centres already, and any will do
        rest = distances.sum(-1, keepdim=True) > 0
        likely = torch.where(rest, distances, 1.0).double().cpu()
        pick = torch.multinomial(likely, 1, generator=draw)[:, 0].to(rows.device)
        chosen.append(rows[head, pick])
    return torch.stack(chosen, dim=1)
