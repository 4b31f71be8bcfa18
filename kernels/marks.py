"""Marks that the kernels are to reach in the model of `hopper`, and which of them do: what can be
asked of machine code before there is a GPU to measure.

    for found in marks(report_all(["sm_90"])): print(found.what, found.got, found.holds)

A packed cache is held against our own bf16 by the clocks that a key takes, a packed weight against
a dense one that is read at full bandwidth. What torch's flex_attention takes is not known here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from . import hopper
from .report import PREDICTED, Report

Reports = Mapping[str, Report]


@dataclass(frozen=True)
class Found:
    """One mark: least and got are ratios of speed, shares of a limit, or (spills) bytes, of which
    `least` is the most there may be."""

    what: str
    least: float
    got: float
    holds: bool


@dataclass(frozen=True)
class Mark:
    """names: the variants that it needs, "folder name". value: of their reports, None where the
    model says nothing of one."""

    what: str
    least: float
    names: tuple[str, ...]
    value: Callable[[list[Report]], float | None]


def clocks(report: Report) -> float | None:
    """Of a multiprocessor, for one turn of one block of the main loop."""
    loop = report.main
    if loop is None or not loop.clocks or not report.result.blocks:
        return None
    return max(loop.clocks.values()) / report.result.blocks


def share(reports: list[Report]) -> float | None:
    """The least share of its limit that one of them reaches."""
    found = [each.main.fraction if each.main else None for each in reports]
    return None if None in found else min(x for x in found if x is not None)


def a_key(reports: list[Report]) -> float | None:
    """How many times as fast as the second one the first one is, key by key."""
    each = [clocks(one) for one in reports]
    if each[0] is None or each[1] is None:
        return None
    keys = [one.sizes["BLOCK_N"] for one in reports]
    return each[1] / keys[1] / (each[0] / keys[0])


def a_weight(reports: list[Report], columns: int, width: str) -> float | None:
    """How many times as fast as a dense product in 16 bits a packed one is, whose turn is `columns`
    weights of each of BLOCK_N outputs for each of the tile's `width`."""
    (one,) = reports
    packed = clocks(one)
    dense = 2 * columns * one.sizes[width] * one.sizes["BLOCK_N"] / hopper.MEMORY
    return None if packed is None else dense / packed


_BF16 = "decode full d128 bf16 g4"
_SUMS = ("chunk_sums_{}_bf16_elu", "forward_{}_bf16_elu")
MARKS = (
    Mark("decode bf16, of the bandwidth", 0.8, (_BF16,), share),
    Mark("decode int8 against bf16", 1.6, ("decode packed int8 d128 g4", _BF16), a_key),
    Mark("decode int4 against bf16", 2.2, ("decode packed int4 d128 g4", _BF16), a_key),
    Mark("decode fp8 against bf16", 1.5, ("decode packed fp8 d128 g4", _BF16), a_key),
    Mark(
        "2:4 against dense, one row",
        1.3,
        ("sparse24 product bf16 of 1",),
        partial(a_weight, columns=8, width="BLOCK_G"),
    ),
    Mark(
        "linear sums and forward, of the limit",
        0.75,
        ("linear scan_bf16", *(f"linear {x.format(d)}" for x in _SUMS for d in (64, 128))),
        share,
    ),
    Mark("Monarch, of the limit", 0.65, ("monarch both 4096 b32 r4 bf16",), share),
)
# of these kinds of variants none is to spill
_NONE = re.compile(r"decode |.* backward_keys_(64|128)_")


def marks(reports: Iterable[Report]) -> list[Found]:
    """Of those marks whose variants are among the reports."""
    by_name = {
        f"{each.result.folder} {each.result.name}": each
        for each in reports
        if each.result.arch == PREDICTED
    }
    found = []
    for mark in MARKS:
        if all(name in by_name for name in mark.names):
            got = mark.value([by_name[name] for name in mark.names])
            if got is not None:
                found.append(Found(mark.what, mark.least, got, got >= mark.least))
    return found + _spills(by_name)


def _spills(by_name: Reports) -> list[Found]:
    """Bytes a thread that the worst variant spills, all in all and in its inner loops: a forward or
    decode kernel's, or of `backward_keys` at head sizes up to 128."""
    kept = [
        each
        for name, each in by_name.items()
        if each.result.spills is not None
        and (_NONE.match(name) or (each.forward and "_256_" not in name))
    ]
    if not kept:
        return []
    whole = max(each.result.spills or 0 for each in kept)
    inner = max((4 * loop.spills for each in kept for loop in each.loops), default=0)
    return [
        Found(f"bytes that a thread spills{where}", 0, got, got == 0)
        for where, got in (("", whole), (" in a loop", inner))
    ]
