"""The tiles that the linear kernels run with, per architecture and width: declared, so that nothing
is tuned at a first call and what is compiled ahead of time is what runs.

A tile is a chunk of `c` tokens by `f` features at a time. The width is the larger one of the head
sizes of K and V, padded; a head of Hedgehog's features is twice as wide as it was."""

from __future__ import annotations

from typing import NamedTuple

from ..flash.tiles import WIDEST, architecture, padded

__all__ = ["TILES", "Tile", "architecture", "padded", "tile"]


class Tile(NamedTuple):
    """Tokens of a chunk, features at once; warps and stages."""

    c: int
    f: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# kernel -> widest head -> tile. All kernels have chunks of 64: they share the states. Chosen by
# what the compiler reports: no spilled registers in the forward kernels, and a part of the features
# at a time, so that another is on its way while one is used: on sm_90 the forward kernel's loop has
# 1.7k clocks of latency, where it had 3.8k with nothing on its way.
TILES: dict[str, dict[int, Tile]] = {
    "tops": {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
    "chunk_sums": {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 8, 1), 256: Tile(64, 64, 8, 1)},
    "forward": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    # forward, no pairs
    "both_ways": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 8, 2)},
    "decode": {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2)},
    "gradient_sums": {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 8, 1), 256: Tile(64, 64, 8, 1)},
    "backward_queries": {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "backward_keys": {64: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
}
# Instead of those, where features are made from directions.
DIRECTED: dict[str, dict[int, Tile]] = {
    "forward": {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    "decode": {128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 1)},
    "backward_queries": {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    "backward_keys": {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
}
DIRECTED_ON: dict[str, dict[str, dict[int, Tile]]] = {
    "gfx942": {"forward": {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1)}},
    "sm_100": {"forward": {128: Tile(64, 32, 8, 1)}},
}
# The widest heads of which two parts fit: into shared memory, or, on sm_80, into registers.
SHALLOW = {"sm_86": 0, "gfx942": 0, "sm_80": 128}
INTERPRETED = Tile(16, 16, 1, 1)  # small, so that small tests have many
SCAN, ROWS = 1024, 64  # elements of a scan's program, rows of one of `slopes`


def tile(kernel: str, arch: str, width: int, directed: bool = False) -> Tile:
    """The tile of `kernel` for a head size of `width`; ValueError for more than WIDEST."""
    if width > WIDEST:
        raise ValueError(
            f"head size: got {width}, valid for impl='triton' are 1 to {WIDEST} (hedgehog: half "
            "of that)"
        )
    if arch == "interpreted":
        return INTERPRETED
    table = TILES[kernel]
    if directed:
        here = DIRECTED_ON.get(arch, {})
        table = table | DIRECTED.get(kernel, {}) | here.get(kernel, {})
    found = table[min(size for size in table if width <= size)]
    return found if width <= SHALLOW.get(arch, WIDEST) else found._replace(stages=1)
