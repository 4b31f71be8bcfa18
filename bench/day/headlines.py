"""The cases of the headlines (`ratios`): rows of the benchmark, few of their contenders, half a
second each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
import triton

from bench import run as benchmark
from bench.case import Case
from bench.day import ceilings, launching
from bench.day.jobs import alone
from bench.day.ratios import HEADLINES
from bench.day.settings import Day
from bench.measure import measure
from effattn.profiling.device import Peaks

SECONDS = 0.5  # of timing a case
CONFIGURATIONS = 4  # that fla may try of each of its kernels; it has a hundred
QUICK = ("SDPA dense", "torch dense", "SDPA")  # peers that need no compiler


@cache
def cases() -> dict[str, Case]:
    """All that the benchmark has for a GPU, by name."""
    return {one.name: one for one in benchmark.all_cases("cuda")}


def chosen(name: str, day: Day) -> Case:
    """The case of that name with those contenders that a headline needs."""
    wanted = {who for one in HEADLINES if one.case == name for who in (one.of, one.over)}
    case = cases()[name]
    raced = tuple(one for one in case.contenders if one.name in wanted)
    if day.tiny:
        raced = tuple(one for one in raced if one.ours or one.name in QUICK)
        return replace(case, contenders=raced, dtype="float32", **_small(case))
    return replace(case, contenders=raced)


def _small(case: Case) -> dict[str, int]:
    """Fields of a case that an ordinary machine is through with at once."""
    sizes = {"tokens": 256, "batch": 1, "heads": 4, "kv_heads": 2, "dim": 64, "inner": 256}
    if hasattr(case, "inner"):
        sizes["tokens"] = 1
    return {field: size for field, size in sizes.items() if hasattr(case, field)}


def names(day: Day) -> list[str]:
    """A job is a case; cases in the order of the headlines."""
    found = list(dict.fromkeys(one.case for one in HEADLINES))
    return found[:2] if day.tiny else found


def run(name: str, day: Day) -> Iterator[dict]:
    """{"case", "contenders"} as the benchmark has them, and what was launched."""
    few_configurations()
    case, limits = chosen(name, day), ceilings.known(day)
    with launching.watched() as seen, alone():
        found = raced(case, torch.device(day.device), limits, 0.01 if day.tiny else SECONDS)
    yield {**found, "name": name, "kernels": dict(seen.launches), **seen.told()}


def raced(case: Case, device: torch.device, limits: Peaks | None, seconds: float) -> dict:
    """`measure`; where one of ours raises, everybody alone, and what it raised in its place."""
    try:
        return measure(case, device, seconds, limits)
    except Exception:
        found: dict = {"case": case.described(), "contenders": {}}
        for one in case.contenders:
            try:
                alone = measure(replace(case, contenders=(one,)), device, seconds, limits)
                found["contenders"] |= alone["contenders"]
            except Exception as error:  # of any kind: it is what came of it
                said = f"{type(error).__name__}: {error}"[-400:]
                found["contenders"][one.name] = {"ours": one.ours, "failed": said}
        return found


def few_configurations() -> None:
    """Lets fla try `CONFIGURATIONS` of each kernel's, evenly spread, in the place of all."""
    autotune = triton.autotune

    def fewer(configs, *args, **options):
        step = max(1, len(configs) // CONFIGURATIONS)
        return autotune(configs[::step][:CONFIGURATIONS], *args, **options)

    triton.autotune = fewer


def launch(name: str, day: Day) -> None:
    """Each of our contenders once, at the length it is timed at and at the one it is checked at."""
    case, device = chosen(name, day), torch.device(day.device)
    for one in case.contenders:
        if one.ours:
            for tokens in {case.length(one), one.check_tokens or case.length(one)}:
                inputs = case.inputs(tokens, device)
                case.once(one.build(case, inputs), inputs)
