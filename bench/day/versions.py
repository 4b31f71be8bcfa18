"""What is there: the GPU, its driver, versions, tools; and whether the carried cache is found."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

from bench.day.settings import Day

PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-linear-attention", "fla-core")
TOOLS = ("ncu", "nvcc", "cuobjdump", "compute-sanitizer", "gcc")
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv")
# one kernel of each kind, to see whether they are found
FIRST = "packed bf16"


def names(day: Day) -> list[str]:
    """What is there, and one job that launches something."""
    return ["versions", "cache"]


def run(name: str, day: Day) -> Iterator[dict]:
    """{"python", "packages", "tools", "gpu"} before anything of ours is imported, and then
    {"environment"}."""
    if name == "cache":
        from bench.day import correctness

        yield from correctness.run(FIRST, day)
        return
    yield {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "gpu": _smi(),
    }
    from bench.results import slug
    from effattn.profiling.device import check_device
    from effattn.profiling.environment import environment

    yield {"environment": environment(), "slug": slug(check_device(day.device))}


def launch(name: str, day: Day) -> None:
    """Nothing that `correctness` does not."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi() -> str | None:
    """What nvidia-smi says; None without it."""
    try:
        return subprocess.run(QUERY, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
