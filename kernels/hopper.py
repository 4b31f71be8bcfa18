"""How much of its limit a kernel's inner loop may reach on an H200, told from its machine code: a
model of issue slots, pipes, latencies and bandwidth. A prediction, to choose between two versions
of a kernel where there is no such GPU; of launches, tails, caches and bank conflicts it says
nothing.

The limit of a loop is the longer of its bytes at full memory bandwidth and its products at the
full rate of wgmma. What it takes is the longest of

    memory   its bytes, or where they are read again by other blocks (more than `REREAD` products a
             byte: they come from the cache) the bytes at the cache's bandwidth
    issue    one instruction a clock in each of four schedulers
    alu fma mufu lsu tensor   the same for the pipe each instruction takes (`PIPES`, in clocks of
             one of the four for a warp; lsu and tensor are shared by the four)
    latency  one warp alone, in order, each instruction when what it reads is there; blocks that
             fit together hide each other's
    flight   what was asked of memory ahead of time, which must cover a trip to it

Clocks and rates are the data sheet's (SXM: 132 multiprocessors, 989 TFLOP/s of bf16, 4.8 TB/s) at
1755 MHz; mma.sync reaches 0.62 of wgmma's rate on Hopper (Luo et al., 2024, arXiv:2402.13499);
rates of the pipes are those of the CUDA programming guide's table of arithmetic throughput, and
latencies are rounded from the same paper. None of them was measured by effattn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .listing import Instruction, bits
from .work import Work

CLOCK = 1.755e9
PROCESSORS = 132
MEMORY = 4.8e12 / PROCESSORS / CLOCK  # bytes a clock of one multiprocessor: 20.7
CACHE = 48.0  # the same from the second-level cache
TENSOR = 989e12 / PROCESSORS / CLOCK  # FLOP a clock, wgmma: 4270
SYNC = 0.62  # of it, mma.sync
TRIP = 800  # clocks to memory and back
REREAD = 120  # FLOP a byte; those of tiles with few rows, filled up to 16, are below
SCHEDULERS = 4

# name: (pipe, clocks of the pipe a warp, clocks until the result can be read); the first that fits
PIPES = [
    (re.compile(form), *numbers)
    for form, *numbers in (
        (r"MUFU|I2F|F2I|I2FP|F2F\b|POPC|FLO", "mufu", 8, 20),
        (r"LDG|LD\b|ATOM|RED\b", "lsu", 0, TRIP),
        (r"LDGSTS|STG|ST\b", "lsu", 0, 0),
        (r"LDS|LDSM|SHFL|LDC|ULDC|S2R|S2UR|R2UR", "lsu", 0, 28),
        (r"STS|STSM", "lsu", 0, 0),
        (r"BAR|DEPBAR|WARPSYNC|LDGDEPBAR|ELECT|SYNCS|FENCE", "issue", 0, 0),
        (r"FFMA|FADD|FMUL|HADD2|HMUL2|HFMA2|FSWZADD", "fma", 1, 4),
        (r"IMAD|DMUL|DFMA|DADD", "fma", 2, 5),
        (r"U(?!TC)[A-Z]", "uniform", 0, 10),
        (r"BRA|NOP|EXIT|BSSY|BSYNC|RET|CALL", "issue", 0, 0),
        (r".", "alu", 2, 5),
    )
]
BARRIER = 30  # clocks that a barrier of a block takes when all are there
REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)(\.64)?")


@dataclass(frozen=True)
class Prediction:
    """Of one loop, in clocks of a multiprocessor for one turn of all blocks that it holds."""

    fraction: float  # of the limit
    limit: str  # memory or tensor: which of the two it is a fraction of
    bound_by: str  # the name in `clocks` that is the longest
    clocks: dict[str, float]


def predict(loop: list[Instruction], work: Work, warps: int, blocks: int) -> Prediction | None:
    """For blocks of `warps` warps of which a multiprocessor holds `blocks`; None for a loop that
    neither moves nor multiplies, or blocks that do not fit."""
    if not blocks or not (work.bytes or work.flops):
        return None
    memory, tensor = blocks * work.bytes / MEMORY, blocks * work.flops / TENSOR
    again = work.flops > REREAD * work.bytes
    clocks = _pipes(loop, warps * blocks)
    clocks["memory"] = memory * MEMORY / CACHE if again else memory
    clocks["latency"] = latency(loop)
    if work.ahead and not again:
        clocks["flight"] = TRIP / 2  # three stages: two turns are on their way
    limits = {"tensor": tensor} if again else {"memory": memory, "tensor": tensor}
    limit = max(limits, key=lambda name: limits[name])
    slowest = max(clocks, key=lambda name: clocks[name])
    return Prediction(min(1.0, limits[limit] / clocks[slowest]), limit, slowest, clocks)


def _pipes(loop: list[Instruction], warps: int) -> dict[str, float]:
    """Clocks that so many warps take of each pipe."""
    taken = dict.fromkeys(("issue", "alu", "fma", "mufu", "lsu", "tensor"), 0.0)
    for each in loop:
        taken["issue"] += warps / SCHEDULERS
        if flops := products(each):
            taken["tensor"] += warps * flops[0]
            continue
        pipe, cost, _ = _kind(each.name)
        if pipe == "lsu":  # 128 bytes a clock for all four
            taken["lsu"] += warps * max(1.0, bits(each) / 32)
        elif pipe in taken:
            taken[pipe] += warps * cost / SCHEDULERS
    return taken


def products(each: Instruction) -> tuple[float, bool] | None:
    """Clocks of the whole multiprocessor's matrix units that one warp's part takes, and whether it
    runs by itself; None for other instructions."""
    if shape := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", each.name):
        m, n, k = map(int, shape.groups())
        rate = TENSOR * (1 if each.name[0] == "H" else 2)
        return 2 * m * n * k / 4 / rate, True  # four warps share one
    if shape := re.match(r"[HI]MMA\.(16)(8)(\d+)", each.name):
        m, n, k = map(int, shape.groups())
        rate = TENSOR * SYNC * (1 if each.name[0] == "H" else 2)
        return 2 * m * n * k / rate, False
    return None


def latency(loop: Iterable[Instruction]) -> float:
    """Clocks of one warp that has the multiprocessor for itself."""
    ready: dict[str, float] = {}
    clock, tensor = 0.0, 0.0
    for each in loop:
        name, registers = each.name, _registers(each)
        clock = max([clock, *(ready.get(r, 0.0) for r in registers)])
        if matrix := products(each):
            # a warp reaches a quarter of the units
            begin = max(clock, tensor)
            tensor = begin + matrix[0] * SCHEDULERS
            if not matrix[1]:
                clock, wait = begin, 18 + matrix[0]
        elif "WARPGROUP.DEPBAR" in name:
            clock = max(clock, tensor)
        if not matrix:
            wait = BARRIER if name.startswith("BAR") else _kind(name)[2]
            if name.startswith("BAR"):
                clock += BARRIER
        clock += 1
        if not (matrix and matrix[1]):
            for written in _written(each):
                ready[written] = clock + wait
    return clock


def _kind(name: str) -> tuple[str, int, int]:
    return next((pipe, cost, wait) for form, pipe, cost, wait in PIPES if form.match(name))


def _registers(each: Instruction) -> list[str]:
    found = []
    for kind, number, wide in REGISTER.findall(each.operands):
        found.append(kind + number)
        if wide:
            found.append(f"{kind}{int(number) + 1}")
    if each.when:
        found.append(each.when.lstrip("!"))
    return found


def _written(each: Instruction) -> list[str]:
    """The registers of the result; stores have none."""
    first = REGISTER.search(each.operands)
    if first is None or re.match(r"STS|STG|STSM|LDGSTS|BAR|BRA", each.name):
        return []
    wide = 4 if "MMA" in each.name else 2 if "WIDE" in each.name else 1
    if re.match(r"LDS|LDG|LDC|ULDC|CS2R", each.name):
        wide = max(1, bits(each) // 32)
    return [f"{first[1]}{int(first[2]) + k}" for k in range(wide)]
