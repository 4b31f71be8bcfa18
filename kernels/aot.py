"""Compiles every Triton kernel for GPUs that need not be here, and reads what the machine code
costs.

    results = check_all(["sm_90"])
    [r.name for r in results if r.problem]

Each kernel folder lists what it ships in `ahead_of_time.py`: `variants(arch) -> list[dict]` with

    name        of the variant, unique in its folder
    kernel      the jitted function
    signature   {argument: "*bf16", "i32", "fp32", ... or "constexpr"}; "i32:16" for an integer that
                is known to be a multiple of 16, as strides are. Pointers are taken to be aligned to
                16 bytes, as torch's are.
    constexprs  {argument: value} of the "constexpr" ones
    num_warps, num_stages
    forward     whether it must not spill registers
    dots        whether it has matrix products, which must become matrix-unit instructions in 16-bit
                types
    loop        if it is not the first, which of the inner loops most of the time goes to

Needs triton, but no GPU and no driver; not in a process with TRITON_INTERPRET set, which compiles
nothing."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from effattn.kernels.errors import check_choice

# tcgen05, wgmma, mma.sync, AMD's
MATRIX_UNIT = re.compile(r"\b(UTC\w*MMA|[HQI]GMMA|[HQIOD]MMA|v_mfma)(?=[._\s])")
# a product left to ordinary multiply-adds
FMA_DOT = re.compile(r"\btt\.dot\b.*->\s*tensor<[^>]*#blocked\d*>")


@dataclass(frozen=True)
class Arch:
    """What one multiprocessor (NVIDIA) or compute unit (AMD) holds, in warps, blocks, registers a
    thread and bytes.
    """

    target: GPUTarget
    warps: int
    blocks: int
    shared: int  # of the whole multiprocessor
    shared_block: int  # that one block may have
    shared_reserved: int = 0  # by the system, of each block

    def warps_for(self, registers: int) -> int:
        """How many warps' registers fit."""
        if self.target.backend == "hip":  # 512 a lane in each of 4 SIMDs, given out by 8
            return 4 * min(self.warps // 4, 512 // max(8, -(-registers // 8) * 8))
        # 65536 in each of 4 quarters' equal shares, given out by 256
        by_warp = max(1, -(-registers * 32 // 256)) * 256
        return 4 * (65536 // 4 // by_warp)


ARCHES = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 64, 32, 164 * 1024, 163 * 1024, 1024),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 64, 32, 228 * 1024, 227 * 1024, 1024),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 64, 32, 228 * 1024, 227 * 1024, 1024),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * 1024, 64 * 1024),
}


@dataclass(frozen=True)
class Result:
    """One compiled variant. None: unknown."""

    folder: str
    name: str
    arch: str
    registers: int | None = None  # a thread
    spills: int | None = None  # bytes a thread
    shared: int | None = None  # bytes a block
    blocks: int | None = (
        None  # that run at once on a multiprocessor, by registers, shared memory and threads
    )
    occupancy: float | None = None  # their warps, of the most there can be
    instructions: dict[str, int] | None = None  # of the matrix unit, by name
    problem: str | None = None  # why the check fails


def variants(arch: str) -> list[tuple[str, dict]]:
    """(folder, variant) of every kernel folder that has an `ahead_of_time.py`."""
    check_choice("arch", arch, ARCHES)
    package = importlib.import_module(__package__)
    found = []
    for folder in sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg
    ):
        name = f"{__package__}.{folder}.ahead_of_time"
        if importlib.util.find_spec(name):
            found += [(folder, variant) for variant in importlib.import_module(name).variants(arch)]
    return found


def chosen(arch: str, only: str | None = None) -> list[int]:
    """The numbers among the `variants` of those whose "folder name" has `only` in it; ValueError if
    none has."""
    names = [f"{folder} {variant['name']}" for folder, variant in variants(arch)]
    kept = [index for index, name in enumerate(names) if not only or only in name]
    if not kept:
        nearest = difflib.get_close_matches(only or "", names, 1, 0.0)
        raise ValueError(
            f"only: got {only!r} (did you mean {nearest[0]!r}?), valid is a part of a kernel's "
            "folder and a variant's name, as the table shows them"
        )
    return kept


def check_all(
    arches: Iterable[str] = tuple(ARCHES),
    progress: Callable[[int, int], None] = lambda done, total: None,
    only: str | None = None,
) -> list[Result]:
    """Compiles every variant for each architecture, in as many processes as there are processors,
    and judges it; `only` those that `chosen` keeps.
    """
    return in_processes(_check_one, arches, progress, only)


def in_processes(
    work: Callable[[tuple[str, int]], Any],
    arches: Iterable[str],
    progress: Callable[[int, int], None],
    only: str | None,
) -> list:
    """`work` of each (arch, number among its `variants`): jitted functions do not travel between
    processes."""
    tasks = [(arch, index) for arch in arches for index in chosen(arch, only)]
    workers = min(os.cpu_count() or 1, len(tasks))
    if workers < 2:
        results = map(work, tasks)
        return list(_counted(results, len(tasks), progress))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(_counted(pool.map(work, tasks), len(tasks), progress))


def _counted(results: Iterable, total: int, progress: Callable[[int, int], None]) -> Iterator:
    for done, result in enumerate(results, 1):
        progress(done, total)
        yield result


def _check_one(task: tuple[str, int]) -> Result:
    arch, index = task
    folder, variant = variants(arch)[index]
    return check(variant, arch, folder)


def check(variant: dict, arch: str, folder: str = "") -> Result:
    """Compiles one variant for `arch` (from triton's cache, if it is there) and judges it."""
    limits = ARCHES[check_choice("arch", arch, ARCHES)]
    try:
        compiled = build(variant, limits.target)
    except Exception as error:  # the compiler's own, of any kind: a finding about this variant
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Result(folder, variant["name"], arch, problem=f"does not compile: {reason}")
    return judge(compiled, variant, arch, folder)


def judge(compiled, variant: dict, arch: str, folder: str = "") -> Result:
    """What the machine code needs, and whether that may be."""
    limits = ARCHES[arch]
    registers, spills, instructions = _read_once(compiled, limits.target.backend)
    shared = compiled.metadata.shared
    blocks = blocks_at_once(limits, registers, shared, variant["num_warps"])
    problems = []
    if variant["forward"] and spills:
        problems.append(f"spills {spills} bytes")
    if shared > limits.shared_block:
        problems.append(f"needs {shared} bytes of shared memory, there are {limits.shared_block}")
    narrow = any(kind.startswith(("*bf16", "*fp16")) for kind in variant["signature"].values())
    if variant["dots"] and narrow and (instructions == {} or FMA_DOT.search(compiled.asm["ttgir"])):
        problems.append("has matrix products outside of the matrix unit")
    return Result(
        folder,
        variant["name"],
        arch,
        registers,
        spills,
        shared,
        blocks,
        None if blocks is None else blocks * variant["num_warps"] / limits.warps,
        instructions,
        "; ".join(problems) or None,
    )


def build(variant: dict, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """triton.compile with what the launcher would find out from the arguments: alignment and
    multiples of 16.
    """
    signature, multiples = {}, {}
    for index, name in enumerate(variant["kernel"].arg_names):
        kind, _, multiple = variant["signature"][name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or multiple == "16":
            multiples[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant["kernel"], signature, variant["constexprs"], multiples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"num_warps": variant["num_warps"], "num_stages": variant["num_stages"]}
        return triton.compile(source, target=target, options=options)


def blocks_at_once(limits: Arch, registers: int | None, shared: int, num_warps: int) -> int | None:
    """Blocks of `num_warps` warps on one multiprocessor; 0 if not even one fits."""
    if registers is None:
        return None
    by_shared = limits.shared // max(1, math.ceil((shared + limits.shared_reserved) / 128) * 128)
    return min(
        limits.blocks,
        limits.warps // num_warps,
        limits.warps_for(registers) // num_warps,
        by_shared,
    )


def _read_once(compiled, backend: str) -> tuple[int | None, int | None, dict[str, int] | None]:
    """What the readers below find, kept in triton's cache by what was compiled and what reads it:
    disassembling takes a third of a compilation.
    """
    reader = Path(__file__).read_bytes()
    key = hashlib.sha256(compiled.hash.encode() + reader).hexdigest()
    kept = get_cache_manager(key)
    if file := kept.get_file("usage.json"):
        return tuple(json.loads(Path(file).read_text(encoding="utf-8")))
    found = (read_amdgcn if backend == "hip" else read_cubin)(compiled.asm)
    kept.put(json.dumps(found), "usage.json", binary=False)
    return found


def read_cubin(asm: dict) -> tuple[int | None, int | None, dict[str, int] | None]:
    """Registers, spilled bytes and matrix instructions of an NVIDIA kernel."""
    usage = cuobjdump(asm["cubin"], "-res-usage")
    if usage is None:
        return None, None, None
    if "tt.dot" not in asm["ttgir"] and "_dot" not in asm["ttgir"] and "mma" not in asm["ttgir"]:
        return *parse_usage(usage), {}  # nothing to look for: no product was asked for
    return *parse_usage(usage), count_instructions(cuobjdump(asm["cubin"], "-sass") or "")


def cuobjdump(cubin: bytes, option: str) -> str | None:
    """What the tool that comes with triton says; None where it does not come."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True).stdout


def parse_usage(usage: str) -> tuple[int | None, int | None]:
    """Registers and bytes of stack (Triton's kernels have nothing else there than spills) from
    cuobjdump -res-usage.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)


def read_amdgcn(asm: dict) -> tuple[int | None, int | None, dict[str, int] | None]:
    """The same from the assembler's comments; .vgpr_count holds both kinds of vector registers."""
    text = asm["amdgcn"]
    registers, spills = (
        re.search(pattern, text) for pattern in (r"\.vgpr_count:\s*(\d+)", r"ScratchSize: (\d+)")
    )
    return registers and int(registers[1]), spills and int(spills[1]), count_instructions(text)


def count_instructions(text: str) -> dict[str, int] | None:
    """How many matrix-unit instructions of each kind machine code has; None if there is no code."""
    if not text.strip():
        return None
    counts: dict[str, int] = {}
    for name in MATRIX_UNIT.findall(text):
        counts[name] = counts.get(name, 0) + 1
    return counts
