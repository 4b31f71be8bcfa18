"""One variant at one context and batch: prefill, decode steps, and what each operation takes.

Prefill and steps are what `generate()` does: the model's own cache (`effattn.new_cache`), the
logits of the last token only where the class can leave out the others, one argmax a step. Token ids
are random; times do not depend on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from effattn.evaluate.streaming import cache_bytes
from effattn.hf.cache import new_cache
from effattn.hf.last_logits import last_only
from effattn.measuring.operations import Key, OperationTimer
from effattn.profiling.memory import PeakMemory
from effattn.profiling.timing import Clock, alternate

INSTRUMENTED = 5  # passes with hooks, at most, and as many decode steps
# steps beside the timed ones: two for memory, one to warm up, those with hooks
BESIDE_STEPS = 3 + INSTRUMENTED


class Lane:
    """One variant's model with its cache. `ids`: int64 (B, context)."""

    def __init__(self, name: str, model: nn.Module, ids: torch.Tensor):
        self.name, self.model, self.ids = name, model, ids
        self.cache, self.token, self.steps = None, ids[:, :1], 0
        self.last_only = last_only(model)

    def prefill(self) -> None:
        """From the prompt to the first token. The cache that it leaves holds `context` tokens."""
        self.forget()  # before there is another one
        self.cache, self.steps = new_cache(self.model), 0
        self._forward(self.ids)

    def step(self) -> None:
        """One more token from everything in the cache, which then holds it too."""
        self.steps += 1
        self._forward(self.token)

    @torch.no_grad()
    def _forward(self, ids: torch.Tensor) -> None:
        logits = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, **self.last_only
        ).logits
        self.token = logits[:, -1:].argmax(-1)

    def forget(self) -> None:
        """Lets the cache go."""
        self.cache = None


def warm_up(lanes: Sequence[Lane]) -> None:
    """A few tokens through every lane: thread pools, lazy imports and first calls are not part of a
    first token.
    """
    for lane in lanes:
        ids, lane.ids = lane.ids, lane.ids[:, :8]
        lane.prefill()
        lane.step()
        lane.ids = ids
        lane.forget()


def measure_together(
    lanes: Sequence[Lane], steps: int, seconds: float, tick: Callable[[str, float], None]
) -> dict[str, dict]:
    """Measures `lanes`, which take turns. By name: {"prefill", "decode", "kv_bytes_held" (after the
    prefill)}.

    A phase has "seconds" (of every timed pass), "peak" (bytes that one pass adds, and how that is
    known), "operations" (key: seconds in every pass with hooks); "decode" also has "past", the mean
    of the tokens that the cache held at the timed steps. `tick` is called after every pass with the
    phase and its share of `seconds`."""
    clock = Clock(lanes[0].ids.device)
    found = {lane.name: {} for lane in lanes}
    for lane in lanes:
        found[lane.name]["prefill"] = _instrumented(lane, clock, seconds / 4, tick)
        lane.forget()
    times = alternate(
        {lane.name: lane.prefill for lane in lanes},
        _Turns(clock, lanes, seconds, tick),
        seconds,
        warmup=0,
    )
    for lane in lanes:
        found[lane.name]["prefill"]["seconds"] = times[lane.name]
        found[lane.name]["kv_bytes_held"] = cache_bytes(lane.cache)
    peaks = {lane.name: _step_peak(lane) for lane in lanes}
    times = alternate(
        {lane.name: lane.step for lane in lanes}, clock, seconds, least=min(3, steps), most=steps
    )
    tick("decode", 1.0)
    for lane in lanes:
        rounds, held = len(times[lane.name]), lane.ids.shape[1] + lane.steps
        with OperationTimer(lane.model) as timer:
            passes = [_one(lane.step, clock, timer) for _ in range(INSTRUMENTED)]
        found[lane.name]["decode"] = {
            "seconds": times[lane.name],
            "peak": peaks[lane.name],
            "operations": _columns(passes),
            "past": held - (rounds + 1) / 2,
        }
        lane.forget()
    return found


class _Turns:
    """A clock that frees what a lane's last prefill left before it times the next one, and reports
    progress.
    """

    def __init__(self, clock: Clock, lanes: Sequence[Lane], seconds: float, tick):
        self.clock, self.lanes, self.seconds, self.tick, self.spent = (
            clock,
            lanes,
            seconds,
            tick,
            0.0,
        )

    def __call__(self, call: Callable[[], None]) -> float:
        for lane in self.lanes:
            if call == lane.prefill:
                lane.forget()
        took = self.clock(call)
        self.spent += took
        self.tick("prefill", min(1.0, self.spent / self.seconds))
        return took


def _instrumented(lane: Lane, clock: Clock, seconds: float, tick) -> dict:
    """Prefills with hooks: one with the peak of memory; more, without that first one, as long as
    `seconds` last.
    """
    start = time.perf_counter()
    with OperationTimer(lane.model) as timer, PeakMemory(lane.ids.device) as peak:
        passes = [_one(lane.prefill, clock, timer)]
    tick("prefill", 0.0)
    took = time.perf_counter() - start
    more = min(INSTRUMENTED, int(seconds / max(took, 1e-9)))
    if more >= 2:
        with OperationTimer(lane.model) as timer:
            passes = [_one(lane.prefill, clock, timer) for _ in range(more)]
    return {"peak": _peak(peak), "operations": _columns(passes)}


def _step_peak(lane: Lane) -> dict:
    """The peak of a step, and the cache's bytes before it. Of the second one: on a CPU only what
    was allocated under the eyes of `PeakMemory` is seen to be freed, and after a first step that is
    all that a step replaces."""
    for _ in range(2):
        held = cache_bytes(lane.cache)
        with PeakMemory(lane.ids.device) as peak:
            lane.step()
    return {**_peak(peak), "held": held}


def _one(call: Callable[[], None], clock: Clock, timer: OperationTimer) -> dict[Key, float]:
    clock(call, undo=timer.clear)
    return timer.read()


def _columns(passes: list[dict[Key, float]]) -> dict[Key, list[float]]:
    return {key: [one[key] for one in passes] for key in passes[0]}


def _peak(peak: PeakMemory) -> dict:
    return {"bytes": peak.bytes, "source": peak.source}
