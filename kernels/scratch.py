"""Memory that the torch paths fill again at every call, kept from call to call: on a CPU the page
faults of new memory cost more than filling it (2 M numbers on 2 cores: 1.1 ms when new, 0.3 ms when
kept)."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(numbers: int, dtype: torch.dtype, device: torch.device, slot: int = 0) -> Tensor:
    """(numbers,) or more, with anything in it. On a CPU the same memory for every caller in this
    thread that names the same slot: it must not be returned, or held while another function may ask
    for it."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(numbers, dtype=dtype, device=device)
    name = f"{dtype} {slot}"
    held = getattr(_kept, name, None)
    if held is None or len(held) < numbers:
        with torch.inference_mode(False):
            held = torch.empty(numbers, dtype=dtype)
        setattr(_kept, name, held)
    return held


class Room:
    """Memory for one block's tensors at a time: `room(shape)` is another tensor at each call, and
    after `clear` the same ones again. What `scratch` says of its memory holds for them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.taken = dtype, device, 0
        self.held: dict[tuple, Tensor] = {}

    def clear(self) -> None:
        """All of it may be used again."""
        self.taken = 0

    def __call__(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        self.taken += 1
        key = (self.taken, tuple(shape))
        if key not in self.held:
            numbers = math.prod(shape)
            self.held[key] = scratch(numbers, self.dtype, self.device, self.taken)[:numbers].view(
                shape
            )
        return self.held[key]
