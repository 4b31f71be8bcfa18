"""How fast exact attention is, against SDPA, flex_attention and local-attention, on this CPU or GPU.

Every contender is checked first (`bench_contenders.prepare`): for a wrong answer no time is printed. Then they take
turns in one process, so that drift and other jobs hit all alike. What cannot run is listed with the reason.

`run` measures cases and keeps a JSON-able dictionary of them; a case that is in it already is not measured again.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch

import effattn.kernels
from effattn.kernels.flash import Blocks, Pattern, Window
from effattn.profiling.bench_contenders import Absent, Case, Contender, prepare
from effattn.profiling.environment import environment

FLUSH = 256 * 2**20  # bytes written before each timed call on a GPU, so that nothing is left in its L2
LEAST, MOST = 3, 25  # timed rounds of a case
DENSE, WINDOW, WIDE = Pattern(), Window(back=512), Window(back=4096)
BLOCK, LOOKING_BACK = Blocks(size=512), Blocks(size=256, look_back=1)
GROWTH = (8192, 32768)


# What is raced ---------------------------------------------------------------------------------------------------


def cpu_cases(quick: bool = False) -> list[Case]:
    """Forward in fp32 and bf16 at growing lengths, training at 16384, and how the time grows."""
    ours = [Contender("ours", pattern) for pattern in (WINDOW, BLOCK, LOOKING_BACK)]
    peers = [Contender("flex", WINDOW), Contender("local-attention", WINDOW)]
    cases = []
    for dtype in ("float32", "bfloat16"):
        for tokens in (4096,) if quick else (4096, 8192, 16384, 32768):
            raced = [Contender("sdpa", DENSE), *peers, *ours]
            if tokens > 16384:
                raced.remove(raced[0])  # 10 s a call, and 4 times that of 16384
            if dtype == "bfloat16" and tokens > 4096:
                raced.remove(peers[1])  # local-attention: seconds a call, as its bf16 products are emulated
            cases.append(Case("forward", dtype, tokens, tuple(raced)))
    tokens = 2048 if quick else 16384
    cases.append(Case("forward+backward", "float32", tokens, (Contender("sdpa", DENSE), *peers, *ours)))
    grown = tuple(Contender("ours", x.pattern, tokens) for x in ours for tokens in GROWTH)
    cases.append(Case("forward", "float32", GROWTH[1], grown, title="growth"))
    return cases


def gpu_cases(quick: bool = False) -> list[Case]:
    """bf16, 4 query heads a K/V head: dense and windowed, forward and training; and decoding from at least 1 GiB."""
    cases = []
    for dim in (128,) if quick else (64, 128):
        for tokens in (4096,) if quick else (4096, 16384, 65536):
            for what in ("forward", "forward+backward"):
                for pattern in (DENSE, WINDOW, WIDE):
                    if type(pattern) is Window and pattern.back >= tokens:
                        continue
                    dense = [Contender(f"sdpa-{name}", DENSE) for name in ("flash", "cudnn", "efficient")]
                    raced = (*dense, Contender("flex", pattern), Contender("ours", pattern))
                    title = "dense" if pattern is DENSE else f"window {pattern.back}"
                    batch = max(1, 16384 // tokens)
                    cases.append(Case(what, "bfloat16", tokens, raced, batch, 32, 8, dim, title))
    for batch, tokens in ((16, 4096),) if quick else ((1, 65536), (16, 4096), (16, 16384)):
        raced = tuple(Contender(kind, DENSE) for kind in ("sdpa", "flex", "ours"))
        cases.append(Case("decode", "bfloat16", tokens, raced, batch, 32, 8, 128))
    return cases


# Timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a call: wall clock on a CPU, events on a GPU, after its L2 was overwritten."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH if self.gpu else 0, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable) -> float:
        if not self.gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def measure(case: Case, device: torch.device, seconds: float) -> dict:
    """The case's shapes and, by contender, {"ms_p20", "ms_p50", "ms_p80", "error"}, {"absent": why} or {"wrong": how}.
    Rounds fill `seconds`, within LEAST and MOST."""
    rows: dict[str, dict] = {}
    calls: dict[str, Callable] = {}
    made: dict[int, list] = {}
    for contender in case.contenders:
        tokens = contender.tokens or case.tokens
        if tokens not in made:
            made[tokens] = _input_sets(case, tokens, device)
        sets = made[tokens]
        try:
            call, error = prepare(contender, case, sets[0])
        except (Absent, ArithmeticError) as reason:
            rows[contender.name] = {"absent" if isinstance(reason, Absent) else "wrong": str(reason)}
            continue
        rows[contender.name] = {"error": error, "ms": []}
        calls[contender.name] = _timed(call, case, sets)
    clock = Clock(device)
    once = {name: clock(call) for name, call in calls.items()}  # the second call of each: warm
    rounds = min(MOST, max(LEAST, int(seconds / max(sum(once.values()), 1e-9))))
    for _ in range(rounds):
        for name, call in calls.items():
            rows[name]["ms"].append(1000 * clock(call))
    for name, call in calls.items():
        times = torch.tensor(rows[name].pop("ms"), dtype=torch.float64)
        p20, p50, p80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        rows[name] |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "rounds": rounds}
        if case.what == "decode":
            rows[name] |= {"kv_bytes": case.kv_bytes(), "gb_per_s": case.kv_bytes() / p50 / 1e6}
        if device.type == "cuda":
            rows[name]["peak_bytes"] = _peak_on_gpu(call)
    return {"case": case.described(), "contenders": rows}


def _input_sets(case: Case, tokens: int, device: torch.device) -> list[list[torch.Tensor]]:
    """Decoding gets several caches in turn, 1 GiB together, so that none is found in a processor's cache."""
    count = max(2, math.ceil(2**30 / case.kv_bytes())) if case.what == "decode" and device.type == "cuda" else 1
    return [case.inputs(tokens, device, seed) for seed in range(count)]


def _timed(call: Callable, case: Case, sets: list) -> Callable:
    turn = count()
    upstream = torch.randn_like(sets[0][0]) if case.what == "forward+backward" else None

    def timed():
        inputs = sets[next(turn) % len(sets)]
        if upstream is not None:
            return torch.autograd.grad(call(*inputs), inputs, upstream)
        with torch.no_grad():
            return call(*inputs)

    return timed


def _peak_on_gpu(call: Callable) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def read_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second at which the device reads a large buffer: the best of a few sums, over fp32 and bf16."""
    clock, best = Clock(device), math.inf
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        best = min(best, *(clock(call) for call in 6 * [x.sum, x.amax]))
    return size / best


# Memory on a CPU -------------------------------------------------------------------------------------------------


def peak_memory(pattern: Pattern, tokens: int, backward: bool) -> int:
    """Bytes that a call of 8 heads of 64 in fp32 adds at most to a fresh process of its own that holds the inputs."""
    code = (
        "from effattn.kernels.flash import Blocks, Pattern, Window\n"
        "from effattn.profiling.bench_attention import _peak_here\n"
        f"print(_peak_here({pattern!r}, {tokens}, {backward}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _peak_here(pattern: Pattern, tokens: int, backward: bool) -> int:
    case = Case("forward+backward" if backward else "forward", "float32", tokens, (Contender("ours", pattern),))
    small, inputs = case.inputs(1024, torch.device("cpu")), case.inputs(tokens, torch.device("cpu"))
    call, _ = prepare(case.contenders[0], case, small)
    _timed(call, case, [small])()  # starts the thread pool, loads what is loaded late
    timed = _timed(call, case, [inputs])
    held = _resident()
    with suppress(OSError):  # elsewhere than on Linux, the peak may be an older one
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    timed()
    return _peak_resident() - held


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident() -> int:
    return _status("VmRSS") or _peak_resident()


def memory_growth(lengths: tuple[int, int] = GROWTH) -> dict:
    """{"ours window 512 forward": {"8192": bytes, "32768": bytes}, ...}"""
    found = {}
    for pattern, backward in ((WINDOW, False), (WINDOW, True), (BLOCK, False), (BLOCK, True)):
        name = f"{Contender('ours', pattern).name} {'forward+backward' if backward else 'forward'}"
        found[name] = {str(tokens): peak_memory(pattern, tokens, backward) for tokens in lengths}
    return found


# All of it -------------------------------------------------------------------------------------------------------


def sources() -> str:
    """A digest of the kernels' source: results of other code are not added to."""
    root = Path(effattn.kernels.__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def settings(device: torch.device, quick: bool) -> dict:
    return {"device": device.type, "quick": quick, "sources": sources(), "threads": torch.get_num_threads()}


def resume(stored: dict | None, wanted: dict) -> dict:
    """`stored` results to go on with, or new ones. ValueError if they were made with other settings."""
    if stored is None:
        return {"kind": "bench_attention", "settings": wanted, "cases": {}}
    if stored.get("settings") != wanted:
        old = stored.get("settings")
        raise ValueError(f"output: holds results of other settings ({old}, now {wanted}); start over with --fresh")
    return stored


def run_tests(files: list[Path]) -> None:
    """The kernels' tests on this device. RuntimeError if one fails."""
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise RuntimeError(f"tests: {', '.join(missing)} not found; run from a checkout")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *map(str, files)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if line.strip()][-3:]
        raise RuntimeError(f"tests: they fail here, nothing is timed: {'; '.join(last)[-500:]}")


def run(
    cases: list[Case],
    device: torch.device,
    results: dict,
    seconds: float = 8.0,
    done: Callable[[str, dict], None] = lambda name, results: None,
) -> dict:
    """Measures the cases that `results` lacks, about `seconds` each, and returns `results`. `done` is called after each
    case, with its name and the results so far: to save and to show them."""
    if "read_bytes_per_s" not in results:
        results["read_bytes_per_s"] = read_bandwidth(device) if device.type == "cuda" else None
    for case in cases:
        if case.name not in results["cases"]:
            results["cases"][case.name] = measure(case, device, seconds)
            results["environment"] = environment()
        done(case.name, results)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def parse_part(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"part: got {text!r}, valid is like 1/3, 2/3, 3/3")
    return int(index), int(count)
