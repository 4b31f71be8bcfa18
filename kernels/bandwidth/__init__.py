"""What a device can move: copy, read and write one long run of memory, and launch a kernel that
does nothing.

    copy(source, out)                  # out = source
    sums = read(source)                # reads everything, writes next to nothing
    write(out, 1.0)
    launch("cuda")

These kernels are the yardstick that others are held against, so that they do nothing else; the sums
and the values exist for the compiler, which would drop reads that nobody uses, and for the tests.
Tensors are float32, contiguous, on one device, of any length (addresses are 64 bits wide). `time`
belongs to the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash import choose

__all__ = ["IMPLEMENTATIONS", "copy", "launch", "read", "write"]

IMPLEMENTATIONS = ("auto", "torch", "triton")


def copy(source: Tensor, out: Tensor, impl: str = "auto") -> None:
    """Writes `source` into `out`, both (N,) float32: 4 N bytes read and as many written."""
    _check(source=source, out=out)
    if source.shape != out.shape or source.device != out.device:
        raise ValueError(
            f"out: got {tuple(out.shape)} on {out.device}, valid is {tuple(source.shape)} on "
            f"{source.device}, as source"
        )
    _module(impl, source.device).copy(source, out)


def read(source: Tensor, impl: str = "auto") -> Tensor:
    """Reads `source`, (N,) float32: 4 N bytes. Returns partial sums, (programs,), that add up to
    its sum.
    """
    _check(source=source)
    return _module(impl, source.device).read(source)


def write(out: Tensor, value: float, impl: str = "auto") -> None:
    """Fills `out`, (N,) float32, with `value`: 4 N bytes written."""
    _check(out=out)
    _module(impl, out.device).write(out, value)


def launch(device: torch.device | str, impl: str = "auto") -> None:
    """Starts the least there is: an empty kernel; on a CPU, a torch operation without elements."""
    _module(impl, torch.device(device)).launch(torch.device(device))


def _module(impl: str, device: torch.device):
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, valid are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if choose(impl, device) == "triton":
        from . import triton_impl

        return triton_impl
    from . import torch_impl

    return torch_impl


def _check(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != torch.float32 or x.ndim != 1 or not x.numel() or not x.is_contiguous():
            got = f"{x.dtype} {tuple(x.shape)}{'' if x.is_contiguous() else ', strided'}"
            raise ValueError(
                f"{name}: got {got}, valid is a contiguous float32 vector of at least one element"
            )
