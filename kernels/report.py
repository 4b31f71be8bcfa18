"""What the inner loops of the compiled kernels cost, and what an H200 may make of them.

    for report in report_all(["sm_90"], only="decode"):
        report.main.fraction, report.main.bound_by

Work (bytes, FLOP) is read from Triton's intermediate code, cost from the machine's (`listing`), the
prediction is `hopper`'s. Numbers that cannot be known are None, and `unknown` says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from . import aot, hopper, listing, work

PREDICTED = "sm_90"  # the architecture that `hopper` is about


@dataclass(frozen=True)
class LoopReport:
    """An innermost loop, or all of a kernel that has none; a turn of one block."""

    instructions: int  # of a warp
    barriers: int
    bytes: int | None  # from and to device memory
    flops: int | None
    global_widths: dict[int, int]  # bits of a thread: how many such loads and stores
    shared_widths: dict[int, int]
    matrix: str
    spills: int = 0  # loads and stores of spilled registers
    fraction: float | None = None  # of the limit, predicted
    limit: str | None = None  # which limit: memory or tensor
    bound_by: str | None = None
    clocks: dict[str, float] | None = None


@dataclass(frozen=True)
class Report:
    """One variant: `result` as the check has it, and its loops in the order of the program."""

    result: aot.Result
    warps: int
    source: str  # what was read: sass, ptx or amdgcn
    loops: list[LoopReport]
    unknown: str | None = None  # why numbers are missing
    forward: bool = True  # the variant's: not a gradient
    sizes: dict[str, int] = field(default_factory=dict)  # the variant's tile: BLOCK_N and so on
    loop: int = 0  # the variant's: which of the loops that move or multiply is to be looked at

    @property
    def main(self) -> LoopReport | None:
        """The loop to look at."""
        busy = [loop for loop in self.loops if loop.bytes or loop.flops] or self.loops
        return busy[self.loop] if busy else None

    def to_dict(self) -> dict:
        """Plain data, for JSON; the result's fields beside the others."""
        plain = asdict(self)
        main = self.main
        return plain.pop("result") | plain | {"main": None if main is None else asdict(main)}


def report_all(
    arches: Iterable[str] = (PREDICTED,),
    progress: Callable[[int, int], None] = lambda done, total: None,
    only: str | None = None,
) -> list[Report]:
    """Of every variant, or those that `aot.chosen` keeps."""
    return aot.in_processes(_report_one, arches, progress, only)


def _report_one(task: tuple[str, int]) -> Report:
    arch, index = task
    folder, variant = aot.variants(arch)[index]
    return report(variant, arch, folder)


def report(variant: dict, arch: str, folder: str = "") -> Report:
    """Compiles one variant and reads it."""
    result = aot.check(variant, arch, folder)
    warps, which = variant["num_warps"], variant.get("loop", 0)
    given = {"forward": variant.get("forward", True), "sizes": _sizes(variant), "loop": which}
    if result.registers is None and (result.problem or "").startswith("does not compile"):
        return Report(result, warps, "", [], result.problem, **given)
    asm = aot.build(variant, aot.ARCHES[arch].target).asm
    text, dialect = machine_code(asm)
    found = listing.innermost(listing.read(text, dialect), dialect)
    done = work.innermost(asm["ttgir"])
    if len(found) != len(done):
        reason = f"the compiler made {len(found)} inner loops of {len(done)}"
        loops = [_loop(each) for each in found]
        return Report(result, warps, dialect, loops, reason, **given)
    reason = None
    if arch != PREDICTED or dialect != "sass":
        reason = f"no prediction: it is for {PREDICTED}'s machine code, this is {arch}'s {dialect}"
    loops = []
    for instructions, each in zip(found, done, strict=True):
        guess = None
        if reason is None:
            guess = hopper.predict(instructions, each, warps, result.blocks or 0)
        loops.append(_loop(instructions, each, guess))
    return Report(result, warps, dialect, loops, reason, **given)


def _sizes(variant: dict) -> dict[str, int]:
    """Of its tile."""
    constexprs = variant.get("constexprs", {})
    return {name: size for name, size in constexprs.items() if name.startswith("BLOCK_")}


def machine_code(asm: dict) -> tuple[str, str]:
    """(text, dialect)"""
    if "amdgcn" in asm:
        return asm["amdgcn"], "amdgcn"
    sass = aot.cuobjdump(asm["cubin"], "-sass")
    return (sass, "sass") if sass else (asm["ptx"], "ptx")


def _loop(instructions, done: work.Work | None = None, guess=None) -> LoopReport:
    counts = listing.count(instructions)
    predicted = {} if guess is None else vars(guess)
    moved = (None, None) if done is None else (done.bytes, done.flops)
    return LoopReport(
        counts.instructions,
        counts.barriers,
        *moved,
        counts.global_widths,
        counts.shared_widths,
        counts.matrix,
        counts.spills,
        **predicted,
    )
