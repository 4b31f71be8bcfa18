"""What a long piece of work says while it runs, and which process says it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext


class Quiet:
    """Says and shows nothing: the base of the command line's progress display.

    with show.stage("measuring") as progress:
        progress(done, total)
    """

    def stage(self, text: str) -> AbstractContextManager:
        """Nothing is shown."""
        return nullcontext(lambda done, total: None)


def main_process() -> bool:
    """Whether this process measures and writes: the only one, or rank 0 of several."""
    return int(os.environ.get("RANK", "0")) == 0
