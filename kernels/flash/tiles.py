"""The tiles that the flash kernels run with, per architecture and head size: declared, so that
nothing is tuned at a first call and what is compiled ahead of time is what runs.

A tile is BLOCK_M queries by BLOCK_N keys, of which a kernel keeps the first or the second; along
the other it goes in tiles of that size where all pairs count, and of STEP elsewhere. The head size
is the larger one of K and V, padded."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

WIDEST = 256


class Tile(NamedTuple):
    """Queries, keys, keys at a step where pairs are masked; warps and stages."""

    m: int
    n: int
    step: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# kernel -> architecture -> widest head -> tile. "sm_86" is every other CUDA GPU: at most 99 KiB of
# shared memory. Chosen by what the compiler reports: no spilled registers in `forward`, few in the
# others, and then the most reuse or blocks at once. STEP is below the tile where the predicates of
# its borders need the registers.
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "forward": {
        "sm_80": {
            64: Tile(128, 32, 32, 4, 3),
            128: Tile(128, 64, 32, 8, 2),
            256: Tile(64, 32, 32, 8, 2),
        },
        "sm_86": {
            64: Tile(128, 64, 32, 4, 2),
            128: Tile(128, 32, 32, 8, 2),
            256: Tile(64, 16, 16, 4, 2),
        },
        "sm_90": {
            64: Tile(128, 128, 32, 4, 3),
            128: Tile(128, 64, 64, 8, 3),
            256: Tile(128, 64, 32, 8, 2),
        },
        "sm_100": {
            64: Tile(128, 64, 32, 4, 3),
            128: Tile(128, 64, 64, 8, 3),
            256: Tile(128, 32, 32, 8, 2),
        },
        "gfx942": {
            64: Tile(128, 64, 64, 4, 1),
            128: Tile(128, 64, 64, 4, 1),
            256: Tile(64, 32, 32, 4, 1),
        },
    },
    "backward_queries": {
        "sm_80": {
            64: Tile(64, 64, 64, 4, 2),
            128: Tile(64, 64, 32, 4, 2),
            256: Tile(32, 32, 32, 4, 1),
        },
        "sm_86": {
            64: Tile(64, 64, 32, 4, 2),
            128: Tile(64, 32, 32, 4, 2),
            256: Tile(32, 16, 16, 4, 1),
        },
        "sm_90": {
            64: Tile(64, 64, 64, 4, 2),
            128: Tile(128, 64, 64, 8, 2),
            256: Tile(64, 32, 16, 8, 2),
        },
        "sm_100": {
            64: Tile(128, 64, 64, 8, 2),
            128: Tile(128, 64, 64, 8, 2),
            256: Tile(64, 32, 32, 8, 1),
        },
        "gfx942": {
            64: Tile(64, 64, 64, 4, 1),
            128: Tile(64, 32, 32, 4, 1),
            256: Tile(32, 32, 32, 4, 1),
        },
    },
    "backward_keys": {
        "sm_80": {
            64: Tile(32, 64, 32, 4, 2),
            128: Tile(32, 64, 32, 8, 2),
            256: Tile(32, 32, 32, 8, 1),
        },
        "sm_86": {
            64: Tile(32, 64, 32, 4, 2),
            128: Tile(32, 64, 32, 8, 2),
            256: Tile(16, 32, 16, 4, 1),
        },
        "sm_90": {
            64: Tile(64, 128, 32, 8, 2),
            128: Tile(32, 128, 32, 8, 2),
            256: Tile(32, 64, 16, 8, 2),
        },
        "sm_100": {
            64: Tile(32, 128, 32, 8, 2),
            128: Tile(64, 128, 64, 8, 1),
            256: Tile(32, 32, 32, 8, 1),
        },
        "gfx942": {
            64: Tile(64, 64, 64, 4, 1),
            128: Tile(32, 64, 32, 4, 1),
            256: Tile(32, 32, 32, 4, 1),
        },
    },
}

# Instead of those, for calls with a mask, slots or keys that everyone sees, which need more
# registers.
HEAVY: dict[str, dict[str, dict[int, Tile]]] = {
    "forward": {
        "sm_80": {128: Tile(128, 32, 32, 8, 3), 256: Tile(64, 64, 32, 8, 1)},
        "sm_90": {
            64: Tile(128, 64, 32, 4, 3),
            128: Tile(128, 64, 32, 8, 3),
            256: Tile(128, 32, 16, 8, 2),
        },
        "sm_100": {256: Tile(64, 32, 32, 8, 2)},
    },
    "backward_queries": {
        "sm_80": {128: Tile(64, 32, 32, 8, 2)},
        "sm_90": {128: Tile(128, 64, 32, 8, 2)},
    },
}

# Instead of both, for calls with far pairs, whose programs go through two sets of queries and keys.
TWO_PARTS: dict[str, dict[str, dict[int, Tile]]] = {
    "forward": {
        "sm_80": {128: Tile(128, 32, 32, 8, 3)},
        "sm_90": {64: Tile(128, 64, 32, 8, 3), 128: Tile(128, 64, 32, 8, 3)},
    },
}

# fp32 has no tensor cores in full precision; these exist to be right, on every architecture.
FLOAT32: dict[int, Tile] = {
    64: Tile(32, 32, 32, 4, 1),
    128: Tile(32, 32, 32, 8, 1),
    256: Tile(16, 16, 16, 8, 1),
}
INTERPRETED = Tile(32, 32, 16, 1, 1)  # small, so that small tests have many
ROWS = Tile(64, 0, 0, 4, 1)  # backward_rows: no product


def tile(
    kernel: str,
    arch: str,
    width: int,
    dtype: torch.dtype,
    heavy: bool = False,
    two_parts: bool = False,
) -> Tile:
    """The tile of `kernel` for a head size of `width`; ValueError for more than WIDEST."""
    if width > WIDEST:
        raise ValueError(f"head size: got {width}, valid are 1 to {WIDEST}")
    if arch == "interpreted":
        return INTERPRETED
    table = FLOAT32 if dtype == torch.float32 else TILES[kernel][arch]
    if heavy and dtype != torch.float32:
        table = table | HEAVY.get(kernel, {}).get(arch, {})
    if two_parts and dtype != torch.float32:
        table = table | TWO_PARTS.get(kernel, {}).get(arch, {})
    return table[min(size for size in table if width <= size)]


@cache
def architecture(device: torch.device) -> str:
    """The row of the tables for `device`; "interpreted" for a CPU, where only Triton's interpreter
    runs.
    """
    if device.type != "cuda":
        return "interpreted"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"compute capability: got {major}.{minor}, valid are 8.0 and later")
    known = f"sm_{major}{minor}" if minor == 0 else f"sm_{major}0" if major == 10 else "sm_86"
    return known if known in TILES["forward"] else "sm_86"


def padded(size: int) -> int:
    """The power of two, at least 16, that a head size is padded to inside of the kernels."""
    return max(16, 1 << (size - 1).bit_length())
