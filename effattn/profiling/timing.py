"""Seconds of a call, fairly: clocks that wait for the device, calls that take turns, percentiles.

clock = Clock(torch.device("cuda"))
times = alternate({"ours": ours, "theirs": theirs}, clock, seconds=2)
{name: percentiles(one) for name, one in times.items()}
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

UNKNOWN_CACHE = 64 * 2**20  # bytes assumed of the last-level cache where the system does not say


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last cache before memory: a GPU's L2, a CPU's largest. `UNKNOWN_CACHE` where
    nothing tells.
    """
    if device.type == "cuda":
        return (
            getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or UNKNOWN_CACHE
        )
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            found = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        except OSError:
            continue
        if found:
            sizes.append(int(found[1]) * 1024 ** " KMG".index(found[2] or " "))
    return max(sizes, default=UNKNOWN_CACHE)


class Clock:
    """Seconds that a call takes on `device`: wall clock on a CPU, events on a GPU (CUDA and ROCm
    alike).

    On a GPU the time is from when the device gets to the call to when it has finished it: a device
    that waits for Python's launches is timed waiting. flush: the last-level cache is overwritten
    before each call, outside of the timed span, as in a model where other layers ran in between.
    The GPU is busy with that while the call's first kernels are launched, so that launches are
    hidden behind it."""

    def __init__(self, device: torch.device | str, flush: bool = False):
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"device: got {str(device)!r}, valid are 'cpu' and 'cuda' (ROCm's name in torch, "
                "too)"
            )
        self._flushed = None
        if flush:
            self._flushed = torch.empty(
                2 * last_level_cache(self.device), dtype=torch.int8, device=self.device
            )

    def __call__(self, call: Callable[[], object]) -> float:
        if self._flushed is not None:
            self._flushed.fill_(0)
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        with torch.cuda.device(self.device):
            if self._flushed is None:
                torch.cuda.synchronize()  # nothing of what ran before is timed
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            after.synchronize()
        return before.elapsed_time(after) / 1000


def percentiles(seconds: Sequence[float]) -> dict[str, float | int]:
    """{"p20", "p50", "p80"} in seconds, linear between neighbours, and "rounds", how many there
    were.
    """
    if not seconds:
        raise ValueError("seconds: got none, valid is at least one measurement")
    tenths = (
        statistics.quantiles(seconds, n=10, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 9
    )
    return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7], "rounds": len(seconds)}


def alternate(
    calls: dict[str, Callable[[], object]],
    clock: Callable[[Callable[[], object]], float],
    seconds: float,
    least: int = 3,
    most: int = 50,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Times all `calls` in turns: {name: seconds of each round}, as many of each.

    Rounds go on for about `seconds` (wall clock, all calls together, without the `warmup` rounds),
    but at least `least` and at most `most`. Every two rounds are one order and its reverse, then
    the order is rotated by one: slow drift hits all calls alike, and nobody always runs after the
    same neighbour. A call that raises ends the measurement."""
    if not calls:
        raise ValueError("calls: got none, valid is at least one as {name: function}")
    if not 1 <= least <= most:
        raise ValueError(f"least, most: got {least} and {most}, valid is 1 <= least <= most")
    if seconds < 0 or warmup < 0:
        raise ValueError(f"seconds, warmup: got {seconds} and {warmup}, valid is 0 or more")
    for _ in range(warmup):
        for call in calls.values():
            clock(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start >= seconds:
            break
        for name in turn(list(calls), number):
            times[name].append(clock(calls[name]))
    return times


def turn(names: list[str], number: int) -> list[str]:
    """The order of round `number`: every two rounds an order and its reverse, then rotated by
    one."""
    first = number // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if number % 2 else order
