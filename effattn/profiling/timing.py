"""Seconds of a call, fairly: clocks that wait for the device, calls that take turns, percentiles.

clock = Clock(torch.device("cuda"))
times = alternate({"ours": ours, "theirs": theirs}, clock, seconds=2)
{name: percentiles(one) for name, one in times.items()}

Every time that is taken on a device goes through `Clock`.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

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


class Taken(float):
    """Seconds of a call on its device: a number, with what is known beside it.

    host: seconds until the call had returned, all its work being launched; None on a CPU, where
    that is the same. covered: whether the device still had not begun with it then, so that no
    launch is part of the time. False for a call that itself waits for the device, or launches more
    than a device's queue holds: such a time has Python's in it."""

    host: float | None
    covered: bool

    def __new__(cls, seconds: float, host: float | None = None, covered: bool = True) -> Taken:
        found = super().__new__(cls, seconds)
        found.host, found.covered = host, covered
        return found


class Event(Protocol):
    """A place in a device's queue, as torch's events are."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> None:
        """Waits until it has."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds between the device's being here and there."""


class Gpu:
    """What a clock asks of a GPU, CUDA and ROCm alike. Tests bring one that is not there."""

    CYCLES = 2e9  # a second, of today's fastest; a slower one waits for longer, which does no harm

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        """Seconds of the host's clock."""
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Keeps the device from what is launched next, for about so long."""
        torch.cuda._sleep(int(seconds * self.CYCLES))

    def mark(self) -> Event:
        """An event behind all that was launched before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def current(self) -> contextlib.AbstractContextManager:
        """Launches inside of it go to this device."""
        return torch.cuda.device(self.device)


class Clock:
    """Seconds that a call takes on `device`: wall clock on a CPU, events on a GPU.

    A GPU works while Python goes on launching. So that Python's time is not taken for the GPU's,
    the GPU first waits, for longer than the host needs to launch all of the call: the time is that
    of its kernels back to back, as a CUDA graph would run them, and the host's is beside it
    (`Taken`). Whether it waited for long enough is read off the GPU; where it did not, the call is
    repeated behind a longer wait, at most `LONGEST`.

    flush: the last-level cache is overwritten before each call, outside of the timed span, as in a
    model where other layers ran in between. gpu: what stands for the device, in tests."""

    # seconds: the first wait, the longest, and of work before the first time, which raises a GPU's
    # clock rate
    WAIT, LONGEST, WARM = 2e-3, 64e-3, 0.1

    def __init__(self, device: torch.device | str, flush: bool = False, gpu: Gpu | None = None):
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"device: got {str(device)!r}, valid are 'cpu' and 'cuda' (ROCm's name in torch, "
                "too)"
            )
        self._gpu, self._cold = gpu or Gpu(self.device), True
        self._waits: dict[Callable, float] = {}  # of calls that need another than the first
        self._flushed = None
        if flush:
            self._flushed = torch.empty(
                2 * last_level_cache(self.device), dtype=torch.int8, device=self.device
            )

    def __call__(
        self, call: Callable[[], object], undo: Callable[[], object] = lambda: None
    ) -> Taken:
        """undo: called before the call is repeated, for one that changes something."""
        if self.device.type == "cpu":
            if self._flushed is not None:
                self._flushed.fill_(0)
            start = time.perf_counter()
            call()
            return Taken(time.perf_counter() - start)
        with self._gpu.current():
            if self._cold:
                self._warm_up()
            while True:
                wait = self._waits.get(call, self.WAIT)
                taken = self._behind(wait, call)
                if taken.covered or not wait:
                    return taken
                if wait >= self.LONGEST:  # no wait helps: from now on without
                    self._waits[call] = 0.0
                    return taken
                self._waits[call] = min(self.LONGEST, 2 * max(wait, taken.host or 0.0))
                undo()

    def _behind(self, wait: float, call: Callable[[], object]) -> Taken:
        """The call's time after the device waited for so long."""
        gpu = self._gpu
        gpu.mark().synchronize()  # nothing of what ran before is timed
        if self._flushed is not None:
            self._flushed.fill_(0)
        if wait:
            gpu.wait(wait)
        before, start = gpu.mark(), gpu.now()
        call()
        host, after = gpu.now() - start, gpu.mark()
        covered = not before.query()
        after.synchronize()
        return Taken(before.elapsed_time(after) / 1000, host, covered)

    def _warm_up(self) -> None:
        start, self._cold = self._gpu.now(), False
        while self._gpu.now() - start < self.WARM:
            self._gpu.wait(self.WAIT)
            self._gpu.mark().synchronize()


def percentiles(seconds: Sequence[float]) -> dict[str, float | int]:
    """{"p20", "p50", "p80"} in seconds, linear between neighbours, and "rounds", how many there
    were. Of a GPU's times (`Taken`) also "host_p50", and "covered": whether all were.
    """
    if not seconds:
        raise ValueError("seconds: got none, valid is at least one measurement")
    tenths = (
        statistics.quantiles(seconds, n=10, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 9
    )
    found = {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7], "rounds": len(seconds)}
    hosts = [one.host for one in seconds if isinstance(one, Taken) and one.host is not None]
    if hosts:
        found["host_p50"] = statistics.median(hosts)
        found["covered"] = all(getattr(one, "covered", True) for one in seconds)
    return found


def pace(found: Mapping[str, float]) -> float:
    """Seconds from one call to the next, of many in a row, from `percentiles`: the device works on
    one while the host launches the next, so the slower of both decides."""
    return max(found["p50"], found.get("host_p50", 0.0))


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
