"""What every job behind a command needs before it loads anything heavy: silent progress, and its device."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch

from effattn.errors import check_choice


class Quiet:
    """Says and shows nothing: the base of the command line's progress display."""

    def stage(self, text: str):
        return nullcontext(lambda done, total: None)


def device(name: str) -> torch.device:
    """ "auto" is this process's own GPU if there is one, else the CPU. Raises ValueError for other names and for
    "cuda" without one."""
    check_choice("device", name, ("auto", "cpu", "cuda"))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: got 'cuda', torch sees no GPU here; valid are 'auto', 'cpu'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
