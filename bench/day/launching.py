"""What happens at a launch: which kernels there are, whether they had to be compiled, and the same
ones with other options."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import triton
from triton.runtime.jit import JITFunction


@dataclass
class Seen:
    """launches: by kernel. found, compiled: kernels that the cache had, and had not."""

    launches: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)

    def told(self) -> dict:
        """For the results: how many kernels were found, and which were not."""
        return {"found": self.found.total(), "compiled": dict(self.compiled)}


@contextlib.contextmanager
def watched(options: Mapping[str, Mapping[str, int]] | None = None) -> Iterator[Seen]:
    """options: kernel -> what its launches get in the place of what they ask for (num_warps,
    num_stages)."""
    seen, launch, before = Seen(), JITFunction.run, triton.knobs.compilation.listener

    def run(self, *args, **given):
        name = self.fn.__name__
        seen.launches[name] += 1
        return launch(self, *args, **{**given, **(options or {}).get(name, {})})

    def listen(*, src, cache_hit, **others) -> None:
        (seen.found if cache_hit else seen.compiled)[src.name] += 1

    JITFunction.run, triton.knobs.compilation.listener = run, listen
    try:
        yield seen
    finally:
        JITFunction.run, triton.knobs.compilation.listener = launch, before
