"""Launches of the bandwidth kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..rounding import cdiv
from . import triton_kernels as kernels

TILE = dict(BLOCK=4096, num_warps=8)  # 16 elements a thread: four 16-byte loads in flight
RESIDENT = 8  # programs of `read` for each multiprocessor


def copy(source: Tensor, out: Tensor) -> None:
    """out = source, both (N,) float32."""
    with torch.cuda.device_of(source):
        kernels.copy[cdiv(len(source), TILE["BLOCK"]),](source, out, len(source), **TILE)


def read(source: Tensor) -> Tensor:
    """Sums of parts of source (N,) float32, one for each program."""
    blocks = cdiv(len(source), TILE["BLOCK"])
    programs = min(blocks, RESIDENT * _processors(source.device))
    sums = torch.empty(programs, device=source.device)
    with torch.cuda.device_of(source):
        kernels.read[programs,](source, sums, len(source), cdiv(blocks, programs), **TILE)
    return sums


def write(out: Tensor, value: float) -> None:
    """Fills out (N,) float32."""
    with torch.cuda.device_of(out):
        kernels.write[cdiv(len(out), TILE["BLOCK"]),](out, float(value), len(out), **TILE)


def launch(device: torch.device) -> None:
    """A kernel that does nothing."""
    anything = _anything(device)
    with torch.cuda.device_of(anything):
        kernels.nothing[1,](anything, num_warps=1)


@lru_cache
def _anything(device: torch.device) -> Tensor:
    return torch.zeros(1, device=device)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter runs them one after another
    return torch.cuda.get_device_properties(device).multi_processor_count
