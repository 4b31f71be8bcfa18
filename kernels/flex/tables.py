"""Which keys each block of queries visits, read from a torch `BlockMask`.

S: queries of a tile; L: keys that it visits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

QUERIES = 128  # of a tile, where there is no mask


@dataclass(frozen=True)
class Tile:
    """Queries [a, b), and runs of keys: [first, last), and whether the mask is asked there."""

    a: int
    b: int
    runs: tuple[tuple[int, int, bool], ...]

    @property
    def keys(self) -> int:
        """How many it visits."""
        return sum(end - first for first, end, _ in self.runs)

    @property
    def joined(self) -> bool:
        """Whether its keys lie in one piece."""
        return all(one[1] == other[0] for one, other in pairwise(self.runs))

    @property
    def look(self) -> tuple:
        """Two tiles with the same are each other, moved."""
        moved = tuple((first - self.a, end - self.a, asked) for first, end, asked in self.runs)
        return self.b - self.a, moved


@dataclass(frozen=True)
class Tables:
    """tiles: of each row and head of the mask (1 or B, 1 or Hq), those with keys; mask_mod: what
    the pairs of some runs are asked."""

    tiles: list[list[list[Tile]]]
    mask_mod: Callable | None
    series_made: dict = field(default_factory=dict)

    def series(
        self,
        b: int,
        h: int,
    ) -> list[tuple[Tile, int, int]]:
        """(first tile, how many, tokens from one to the next) of tiles that look alike, for row b
        and head h of the mask."""
        if (b, h) not in self.series_made:
            self.series_made[b, h] = list(_series(self.tiles[b][h]))
        return self.series_made[b, h]


def _series(tiles: list[Tile]) -> Iterator[tuple[Tile, int, int]]:
    alike: dict[tuple, list[Tile]] = {}
    for tile in tiles:
        alike.setdefault(tile.look if tile.joined else (tile.a,), []).append(tile)
    for same in alike.values():
        strides = {other.a - one.a for one, other in pairwise(same)}
        if len(strides) > 1:
            yield from ((tile, 1, 0) for tile in same)
        else:
            yield same[0], len(same), strides.pop() if strides else 0


def tables_of(
    block_mask,
    queries: int,
    keys: int,
) -> Tables:
    """Of a BlockMask for so many tokens; None: every query sees every key."""
    if block_mask is None:
        ends = [*range(0, queries, QUERIES), queries]
        tiles = [Tile(a, b, ((0, keys, False),)) for a, b in pairwise(ends)]
        return Tables([[tiles]], None)
    asked = _lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = None
    if block_mask.full_kv_num_blocks is not None:
        full = _lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    size, size_kv = block_mask.BLOCK_SIZE
    tiles = []
    for b, heads in enumerate(asked):
        tiles.append([])
        for h, rows in enumerate(heads):
            made = []
            for n, partial in enumerate(rows):
                blocks = [(one, True) for one in partial]
                blocks += [] if full is None else [(one, False) for one in full[b][h][n]]
                runs = _runs(sorted(blocks), size_kv, keys)
                if runs and n * size < queries:
                    made.append(Tile(n * size, min((n + 1) * size, queries), runs))
            tiles[-1].append(made)
    return Tables(tiles, block_mask.mask_mod)


def _lists(counts: Tensor, indices: Tensor) -> list:
    """(B, H, blocks) numbers and (B, H, blocks, room) -> of each row and head, of each block of
    queries, its blocks of keys."""
    numbers = counts.tolist()
    return [
        [
            [row[:count] for row, count in zip(rows, of_rows, strict=True)]
            for rows, of_rows in zip(heads, of_heads, strict=True)
        ]
        for heads, of_heads in zip(indices.tolist(), numbers, strict=True)
    ]


def _runs(
    blocks: list[tuple[int, bool]],
    size: int,
    keys: int,
) -> tuple:
    """Blocks of keys as runs; neighbours of the same kind are one."""
    runs: list[tuple[int, int, bool]] = []
    for number, asked in blocks:
        first, end = number * size, min((number + 1) * size, keys)
        if runs and runs[-1][1] == first and runs[-1][2] == asked:
            runs[-1] = (runs[-1][0], end, asked)
        elif first < end:
            runs.append((first, end, asked))
    return tuple(runs)


def on_tile(
    mod: Callable,
    score: Tensor | None,
    b: int,
    h: Tensor,
    i: Tensor,
    j: Tensor,
) -> Tensor:
    """A function of scalars on a tile: mod(b, h, i, j), or mod(score, b, h, i, j) with score (H, S,
    L); h (H,), i (S,), j (L,) int64. Returns (H, S, L), maybe expanded."""
    given = () if score is None else (score,)
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        mod = torch.vmap(mod, in_dims=(0,) * len(given) + dims)
    return mod(
        *given,
        torch.tensor(b, device=i.device),
        h,
        i,
        j,
    )


def on_tiles(
    mod: Callable,
    b: int,
    h: Tensor,
    i: Tensor,
    j: Tensor,
) -> Tensor:
    """A function of scalars on tiles, mod(b, h, i, j): h (H,), i (n, S), j (n, L) int64 -> (n, H,
    S, L), maybe expanded."""
    for dims in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (None, None, 0, 0),
    ):
        mod = torch.vmap(mod, in_dims=dims)
    return mod(
        torch.tensor(b, device=i.device),
        h,
        i,
        j,
    )
