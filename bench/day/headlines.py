"""The ratios that say whether the kernels are good, in the order of their worth: rows of the
benchmark, few of their contenders, half a second each.

Beside each stand the target and what was predicted of an H200, before any kernel ran on one: from
instructions, registers and bytes of the machine code that Triton 3.6 makes for sm_90."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from bench import run as benchmark
from bench.case import Case, entry_of
from bench.day import ceilings, launching
from bench.day.jobs import alone
from bench.day.settings import Day
from bench.measure import measure
from effattn.profiling.device import Peaks

SECONDS = 0.5  # of timing a case
CONFIGURATIONS = 4  # that fla may try of each of its kernels; it has a hundred
LARGE = "H32/8 D128"


@dataclass(frozen=True)
class Headline:
    """what: the words of the table. of, over: contenders of `case`, whose times are compared: over
    divided by of, so that more is better; over "" is the share of the read bandwidth that `of`
    reaches. predicted: from and to."""

    what: str
    case: str
    of: str
    over: str
    target: float
    predicted: tuple[float, float] | None = None

    def value(self, results: dict) -> float | None:
        """What was measured, of `results` as the benchmark has them."""
        if not self.over:
            return entry_of(results, self.case, self.of, "read_share")
        mine, theirs = (entry_of(results, self.case, who, "ms_p50") for who in (self.of, self.over))
        return theirs / mine if mine and theirs else None


DECODE, LONG = (
    f"decode bfloat16 {b} {LARGE} {t}" for b, t in (("B16", "T16384"), ("B1", "T65536"))
)
PACKED = f"decode packed bfloat16 B8 {LARGE} T32768"
WINDOW = "sliding(window=512)"
FORWARD, TRAINING, DENSE, DENSE_64 = (
    f"{what} {spec} bfloat16 B1 H32/8 D{dim} T16384"
    for what, spec, dim in (
        ("forward", WINDOW, 128),
        ("forward+backward", WINDOW, 128),
        ("forward", "dense", 128),
        ("forward", "dense", 64),
    )
)
SPARSE = "2:4 product bfloat16 4096x14336 rows1"
REROPE = f"forward ReRoPE bfloat16 B1 {LARGE} T16384"
MONARCH = "product bfloat16 4096x4096 rows512"
LINEAR, TRAINED, RETAINED = (
    f"{what} against packages bfloat16 B2 H32/32 D64 T8192"
    for what in ("forward linear", "forward+backward linear", "forward retention")
)
FLA, RETENTION = (
    "flash-linear-attention",
    "linear(feature_map='identity', decay='retnet', normalize=False)",
)
QUICK = ("SDPA dense", "torch dense", "SDPA")  # peers that need no compiler
OURS, FLEX = f"effattn {WINDOW}", f"flex_attention {WINDOW}"
FULL, DENSELY = "effattn full", "effattn dense"

HEADLINES = (
    Headline("decode, of the read bandwidth", DECODE, DENSELY, "", 0.8, (0.75, 0.85)),
    Headline("decode of one row, of the read bandwidth", LONG, DENSELY, "", 0.8, (0.75, 0.85)),
    Headline("decode against SDPA", DECODE, DENSELY, "SDPA dense", 1.0),
    Headline("decode int8 against bf16", PACKED, "effattn int8", FULL, 1.7, (0.9, 1.3)),
    Headline("decode int4 against bf16", PACKED, "effattn int4", FULL, 2.6, (0.6, 1.1)),
    Headline("decode int2 against bf16", PACKED, "effattn int2", FULL, 2.6),
    Headline("decode fp8 against bf16", PACKED, "effattn fp8", FULL, 1.5, (0.5, 1.0)),
    Headline("window 512 against flex_attention", FORWARD, OURS, FLEX, 1.0, (0.95, 1.1)),
    Headline("window 512, training", TRAINING, OURS, FLEX, 1.0, (0.75, 0.9)),
    Headline("dense against SDPA's flash kernel", DENSE, DENSELY, "SDPA-flash dense", 1.0),
    Headline("dense, D64, against it", DENSE_64, DENSELY, "SDPA-flash dense", 1.0, (0.85, 1.0)),
    Headline(
        "2:4 against dense, one row", SPARSE, "effattn packed 2:4", "torch dense", 1.4, (0.6, 0.9)
    ),
    Headline(
        "ReRoPE against our dense",
        REROPE,
        "effattn rerope(window=512)",
        DENSELY,
        1 / 1.15,
        (0.9, 0.95),
    ),
    Headline("linear against fla", LINEAR, "effattn linear", f"{FLA} linear", 1.0, (1.2, 1.5)),
    Headline("linear, training", TRAINED, "effattn linear", f"{FLA} linear", 1.0),
    Headline(
        "retention against fla",
        RETAINED,
        f"effattn {RETENTION}",
        f"{FLA} {RETENTION}",
        1.0,
        (0.65, 0.75),
    ),
    Headline(
        "Monarch, 512 rows", MONARCH, "effattn monarch(blocks=32)", "nn.Linear 4096x4096", 1.0
    ),
)


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
