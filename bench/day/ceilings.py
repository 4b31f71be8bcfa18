"""What the device can do: bytes a second, products a second. The other steps hold kernels to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from unittest import mock

from bench.day.settings import Day
from effattn.profiling import device

BUDGET = 0.15  # seconds for each thing and size


def names(day: Day) -> list[str]:
    """One job: measurements of bandwidth do not share a device."""
    return ["peaks"]


def run(name: str, day: Day) -> Iterator[dict]:
    """The fields of `Peaks`."""
    less = {"BUDGET": 0.001, "LONGEST": 0.01} if day.tiny else {"BUDGET": BUDGET}
    with mock.patch.multiple(device, **less):
        yield device.measure(device.check_device(day.device)).to_dict()


def known(day: Day) -> device.Peaks | None:
    """What this step found; None where it was not done."""
    try:
        found = json.loads((day.output / "ceilings.json").read_text(encoding="utf-8"))
        return device.Peaks.from_dict(found["jobs"]["peaks"]["results"][0])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def launch(name: str, day: Day) -> None:
    """The yardsticks' kernels."""
    import torch

    from effattn.kernels import bandwidth

    x = torch.empty(1024, device=day.device)
    bandwidth.copy(x, torch.empty_like(x))
    bandwidth.read(x)
    bandwidth.write(x, 1.0)
    bandwidth.launch(x.device)
