"""What all parts of a day share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Day:
    """device: "cuda", or "cpu" to see that everything runs. tiny: sizes that an interpreter of
    kernels is through with in seconds. output: where the results are, earlier steps' included."""

    device: str = "cuda"
    tiny: bool = False
    output: Path = Path("results")
