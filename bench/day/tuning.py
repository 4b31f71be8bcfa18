"""The kernels of the headlines with other warps and stages: what a tile table should say, and how
much there is to be had. One kernel of a call is varied at a time; answers are held to those of the
options that it comes with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from bench.case import Case, Contender
from bench.day import headlines, launching, ratios
from bench.day.jobs import alone
from bench.day.settings import Day
from effattn.profiling.timing import Clock, alternate, percentiles

GRID = [{"num_warps": warps, "num_stages": stages} for warps, stages in product((4, 8), (2, 3))]
SECONDS = 0.25  # of timing one choice beside the usual one
ERROR = 0.02  # relative, between two choices in bf16: sums are made in another order
TUNED = {
    "decode": (ratios.DECODE, ratios.DENSELY),
    "decode int8": (ratios.PACKED, "effattn int8"),
    "decode int4": (ratios.PACKED, "effattn int4"),
    "window": (ratios.FORWARD, ratios.OURS),
    "window, training": (ratios.TRAINING, ratios.OURS),
    "dense": (ratios.DENSE, ratios.DENSELY),
    "2:4": (ratios.SPARSE, "effattn packed 2:4"),
    "linear": (ratios.LINEAR, "effattn linear"),
}


def names(day: Day) -> list[str]:
    """A job is one call."""
    return list(TUNED)[:1] if day.tiny else list(TUNED)


def prepared(name: str, day: Day) -> tuple[Case, Contender, list]:
    """The case, who is tuned, and the inputs."""
    where, who = TUNED[name]
    case = headlines.chosen(where, day)
    one = next(one for one in case.contenders if one.name == who)
    return case, one, case.inputs(case.length(one), torch.device(day.device))


def run(name: str, day: Day) -> Iterator[dict]:
    """{"kernel", "options", "over": time over that of the usual options} of each choice, or
    "failed": why it cannot be launched."""
    case, one, inputs = prepared(name, day)
    call = one.build(case, inputs)
    usual = case.answers(call, inputs)
    clock = Clock(day.device, flush=day.device == "cuda")
    with launching.watched() as seen:
        case.once(call, inputs)
    yield {"kernels": dict(seen.launches)}
    for kernel, options in product(seen.launches, GRID):
        found = {"kernel": kernel, "options": options}

        def varied(kernel=kernel, options=options):
            with launching.watched({kernel: options}):
                case.once(call, inputs)

        try:
            with launching.watched({kernel: options}):
                apart = _apart(case.answers(call, inputs), usual)
            calls = {"usual": lambda: case.once(call, inputs), "varied": varied}
            with alone():
                times = alternate(calls, clock, SECONDS)
        except Exception as error:  # too much shared memory, mostly
            yield found | {"failed": f"{type(error).__name__}: {error}"[-200:]}
            continue
        medians = {who: percentiles(some)["p50"] for who, some in times.items()}
        over = medians["varied"] / medians["usual"]
        yield found | {"over": over, "ms": 1000 * medians["varied"], "right": apart <= ERROR}


def _apart(found: dict, usual: dict) -> float:
    """The largest relative distance of two sets of answers; nan where one is not a number."""
    distances = [
        float((found[name] - x).double().norm() / x.double().norm()) for name, x in usual.items()
    ]
    return max(distances) if all(x == x for x in distances) else float("nan")


def launch(name: str, day: Day) -> None:
    """Every choice once; RuntimeError at the end for those that a compiler refuses."""
    case, one, inputs = prepared(name, day)
    call = one.build(case, inputs)
    with launching.watched() as seen:
        case.once(call, inputs)
    refused = []
    for kernel, options in product(seen.launches, GRID):
        try:
            with launching.watched({kernel: options}):
                case.once(call, inputs)
        except Exception as error:  # of any kind: the other choices go on
            refused.append(f"{kernel} with {options}: {type(error).__name__}: {error}"[:200])
    if refused:
        raise RuntimeError("; ".join(refused))
