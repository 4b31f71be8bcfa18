"""Reads a kernel's machine code: its innermost loops, how wide it loads, which matrix unit it uses.

    instructions = read(sass, "sass")
    for loop in innermost(instructions, "sass"): count(loop)

Three dialects: `sass` (cuobjdump -sass), `amdgcn` (the assembler's text), and `ptx`, which stands
in where nothing disassembles: its instructions are near to those of the machine, not equal."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

DIALECTS = {
    "sass": re.compile(
        r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<when>!?\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);"
    ),
    "ptx": re.compile(
        r"^\s*(?:(?P<at>\$\w+):|\{?\s*(?:@(?P<when>!?%?\w+)\s+)?(?P<name>[a-z][\w.:]*)(?P<rest>[^;]*);)",
        re.MULTILINE,
    ),
    "amdgcn": re.compile(
        r"^(?:(?P<at>\.LBB\w+):|\s+(?P<name>(?:[vs]|ds|global|buffer|flat|scratch)_\w+)(?P<rest>[^;\n]*))",
        re.MULTILINE,
    ),
}
BRANCH = {
    "sass": re.compile(r"BRA\b"),
    "ptx": re.compile(r"bra\b"),
    "amdgcn": re.compile(r"s_c?branch"),
}
TARGET = {
    "sass": re.compile(r"0x([0-9a-f]+)\s*$"),
    "ptx": re.compile(r"(\$\w+)\s*$"),
    "amdgcn": re.compile(r"(\.LBB\w+)"),
}
# what moves numbers from and to device memory, and shared memory to registers
GLOBAL = re.compile(
    r"(LDG|STG|LDGSTS|UBLKCP|UTMALDG)\b|(ld|st)\.global|cp\.async\.c[ag]|(global|buffer)_(load|store)"
)
SHARED = re.compile(r"LDSM?\b|ld(\.volatile)?\.shared|ldmatrix|ds_read|ds_load")
SPILLED = re.compile(r"(LD|ST)L\b|(ld|st)\.local|scratch_(load|store)")
MATRIX = {
    "tcgen05": re.compile(r"UTC\w*MMA|tcgen05\.mma"),
    "wgmma": re.compile(r"[HQI]GMMA|wgmma\.mma_async"),
    "mma.sync": re.compile(r"[HQIOD]MMA\b|mma\.sync"),
    "mfma": re.compile(r"v_mfma"),
}
AMD_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    name: str  # with its modifiers: LDS.128
    operands: str
    when: str | None = None  # the predicate that guards it


@dataclass(frozen=True)
class Loop:
    """What an innermost loop has, a warp; widths are in bits a thread."""

    instructions: int
    barriers: int
    global_widths: dict[int, int]
    shared_widths: dict[int, int]
    spills: int  # loads and stores of registers that were spilled
    matrix: str  # tcgen05, wgmma, mma.sync, mfma or none


def read(text: str, dialect: str) -> list[tuple[str | None, Instruction | None]]:
    """(label, instruction) in order; in SASS each instruction's address is its label, elsewhere
    labels are lines of their own."""
    found: list[tuple[str | None, Instruction | None]] = []
    for match in DIALECTS[dialect].finditer(text):
        parts = match.groupdict()
        label = parts["at"].lstrip("0") or "0" if parts["at"] else None
        name = parts.get("name")
        made = Instruction(name, (parts["rest"] or "").strip(), parts.get("when")) if name else None
        found.append((label, made))
    return found


def innermost(lines: list[tuple[str | None, Instruction | None]], dialect: str):
    """The instructions of each loop that has none inside: from a label to a branch back to it.
    `[whole]` where there is no loop."""
    places = {label: index for index, (label, _) in enumerate(lines) if label}
    spans = {}
    for index, (_, each) in enumerate(lines):
        if each is None or not BRANCH[dialect].match(each.name):
            continue
        target = TARGET[dialect].search(each.operands)
        start = places.get(target[1].lstrip("0") or "0") if target else None
        if start is not None and start < index:  # a branch to itself only fills the last line
            spans[start] = max(index, spans.get(start, 0))
    inner = [
        (start, end)
        for start, end in sorted(spans.items())
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in spans.items())
    ]
    ranges = inner or [(0, len(lines))]
    return [[each for _, each in lines[start : end + 1] if each] for start, end in ranges]


def count(loop: list[Instruction]) -> Loop:
    """What the report shows of a loop."""
    wide: Counter[int] = Counter()
    near: Counter[int] = Counter()
    for each in loop:
        if GLOBAL.match(each.name):
            wide[bits(each)] += 1
        elif SHARED.match(each.name):
            near[bits(each)] += 1
    names = [each.name for each in loop]
    matrix = next((unit for unit, form in MATRIX.items() if any(map(form.match, names))), "none")
    barriers = sum(bool(re.match(r"BAR|bar(rier)?\.|s_barrier", name)) for name in names)
    spills = sum(bool(SPILLED.match(name)) for name in names)
    return Loop(len(loop), barriers, dict(wide), dict(near), spills, matrix)


def bits(each: Instruction) -> int:
    """Of one thread, in a load or store."""
    name = each.name
    if name.startswith("cp.async"):  # the size is the third operand, in bytes
        return 8 * int(each.operands.split(",")[2].strip(), 0)
    if matrices := re.search(r"(?:LDSM\..*\.|ldmatrix.*\.x)(\d)\b", name):
        return 32 * int(matrices[1])
    if name[0].isupper():
        size = re.search(r"\.(?:U|S)?(8|16|64|128)\b", name)
        return int(size[1]) if size else 32
    if re.match(r"(ds|global|buffer)_", name):
        return _amd_bits(name)
    size = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", name)
    return int(size[1] or 1) * int(size[2]) if size else 32


def _amd_bits(name: str) -> int:
    if size := re.search(r"dword(?:x(\d))?", name):
        return 32 * int(size[1] or 1)
    if size := re.search(r"(2(?:st64)?)?_b(\d+)", name):
        return int(size[2]) * (2 if size[1] else 1)
    if size := re.search(r"_[iu](\d+)", name):
        return int(size[1])
    return next((b for kind, b in AMD_BITS.items() if kind in name), 32)
