"""What each innermost loop of a compiled kernel must move and multiply, from Triton's own
intermediate code, in which tensors have shapes: the machine's instructions do not say how many of
their lanes ask for the same bytes.

    innermost(compiled.asm["ttgir"]) -> [Work(bytes=16_384, flops=1_048_576, ahead=True)]
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MOVES = re.compile(
    r"(tt\.load|tt\.store|tt\.atomic_rmw|ttg\.async_copy_global_to_local|"
    r"amd\w*\.buffer_(?:load|store)\w*) "
)
PRODUCT = re.compile(r"(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ")
SHAPE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)")
SCALAR = re.compile(r"!tt\.ptr<(\w+)>")
BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Work:
    """Of one block in one turn of a loop."""

    bytes: int  # from and to device memory
    flops: int  # of matrix products; 2 a multiply-add
    ahead: bool  # whether loads are asked for turns before they are used


def innermost(ttgir: str) -> list[Work]:
    """Of the loops that have none inside, in order; of the whole kernel where there are none."""
    lines = ttgir.splitlines()
    spans, opened = [], []
    for index, line in enumerate(lines):
        if re.search(r"\bscf\.(for|while)\b", line):
            opened.append((index, len(line) - len(line.lstrip()), len(spans)))
        # a loop ends at the brace in its own column; one of `while` has another in between
        while opened and line.startswith(" " * opened[-1][1] + "}") and " do {" not in line:
            start, _, before = opened.pop()
            if len(spans) == before:  # none closed since: none inside
                spans.append((start, index))
            if opened:
                opened[-1] = (*opened[-1][:2], -1)
    return [_work(lines[a:b]) for a, b in sorted(spans)] or [_work(lines)]


def _work(lines: list[str]) -> Work:
    moved = flops = 0
    ahead = False
    for line in lines:
        types = line.rsplit(" : ", 1)[-1]
        if move := MOVES.search(line):
            moved += _bytes(types)
            ahead |= "async_copy" in move[1] or "to_local" in move[1]
        elif PRODUCT.search(line):
            (left, _), (right, _) = SHAPE.findall(types)[:2]
            flops += 2 * math.prod(_sizes(left)) * _sizes(right)[-1]
    return Work(moved, flops, ahead)


def _bytes(types: str) -> int:
    shape = SHAPE.search(types)
    element = shape[2] if shape else SCALAR.search(types)[1]
    size = max(1, int(BITS.findall(element)[0]) // 8)
    return size * (math.prod(_sizes(shape[1])) if shape else 1)


def _sizes(shape: str) -> list[int]:
    return [int(each) for each in shape.split("x") if each]
