"""A GPU that is not there, and a host, both of which take the time that they are told to: what
`timing.Clock` asks of a device, in a simulated time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from effattn.profiling.timing import Gpu


@dataclass
class Place:
    """Behind something in the queue that is done at `at`, or will be."""

    queue: Queue
    at: float

    def query(self) -> bool:
        return self.queue.time >= self.at

    def synchronize(self) -> None:
        self.queue.time = max(self.queue.time, self.at)

    def elapsed_time(self, end: Place) -> float:
        return 1000 * (end.at - self.at)


class Queue(Gpu):
    """time: the host's; free: when the device has done all that was launched. `most` kernels wait
    at a time; whoever launches another one has to wait for the first of them."""

    def __init__(self, most: int = 1024, rate: float = 1.0):
        self.time = self.free = 0.0
        self.rate, self.most, self.waits = rate, most, []
        self.ends: list[float] = []

    def host(self, seconds: float) -> None:
        """Python does something."""
        self.time += seconds

    def launch(self, seconds: float, host: float = 5e-6) -> None:
        """A kernel of that length, which takes `host` to launch."""
        self.time += host
        self.ends = [end for end in self.ends if end > self.time]
        if len(self.ends) >= self.most:
            self.time = self.ends.pop(0)
        self.free = max(self.free, self.time) + seconds
        self.ends.append(self.free)

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.launch(seconds * self.rate)

    def mark(self) -> Place:
        self.time += 1e-6
        return Place(self, max(self.free, self.time))

    def current(self):
        return contextlib.nullcontext()
