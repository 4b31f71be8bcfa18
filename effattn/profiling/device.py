"""What this device can do, measured on it: bandwidth, matrix products, the time to start a kernel.
No datasheet.

    peaks = device.peaks("cuda")               # measured once, then read from the cache
    peaks.read_bytes_per_s, peaks.matmul_flops["bfloat16"]

Peaks are the best of several sizes and repeats, as a limit should be. Kept as JSON in
$EFFATTN_CACHE, or else $XDG_CACHE_HOME/effattn, or else ~/.cache/effattn, one file for each device,
number of threads and version of torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from effattn.errors import Unsupported, check_choice
from effattn.kernels import bandwidth
from effattn.profiling import environment
from effattn.profiling.memory import available_bytes
from effattn.profiling.timing import Clock, last_level_cache
from effattn.reports.files import write_text_atomic

FORMAT = 1  # of the cached file; older ones are measured again
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
BUDGET = 0.4  # seconds for each thing and size
LONGEST = 0.25  # seconds that one product may take: larger ones are not tried
SMALLEST = 256  # rows and columns of the first product


@dataclass(frozen=True)
class Peaks:
    """What one device can do. None: it cannot, or nobody could find out.

    kind: "cpu", "cuda" or "rocm"; threads: torch's on a CPU; date: UTC, ISO; bandwidths in bytes
    per second, copy counting what is read and what is written; matmul_flops: dtype -> operations
    per second, a multiply-add being 2, of torch's own product ("float32" without TF32, "int8" into
    int32); launch_seconds: from one empty kernel to the next, on a CPU one torch operation on
    nothing."""

    device: str
    kind: Literal["cpu", "cuda", "rocm"]
    threads: int | None
    date: str
    versions: dict[str, str | None]
    copy_bytes_per_s: float | None
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    matmul_flops: dict[str, float | None]
    launch_seconds: float | None

    def to_dict(self) -> dict:
        """Plain numbers, strings and dicts, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Peaks:
        """The inverse of `to_dict`. ValueError for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"peaks: got {got}, valid is an object with {', '.join(sorted(names))}"
            )
        check_choice("peaks: kind", values["kind"], ("cpu", "cuda", "rocm"))
        if not isinstance(values["matmul_flops"], dict) or not isinstance(values["versions"], dict):
            raise ValueError("peaks: matmul_flops and versions: valid are objects")
        speeds = {name: values[name] for name in names if name.endswith(("_per_s", "_seconds"))}
        for name, value in {**speeds, **values["matmul_flops"]}.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise ValueError(
                    f"peaks: {name}: got {value!r}, valid is a number above 0, or null"
                )
        return cls(**values)


def peaks(
    device: torch.device | str = "cpu",
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Peaks:
    """The peaks of `device` ("cpu", "cuda", "cuda:1"): from the cache, or measured now and written
    there.

    refresh: measure in any case. A cached file that cannot be read is measured again; a folder that
    cannot be written is a warning. progress: called with the name of what is measured next. Takes
    10 to 20 seconds."""
    device = check_device(device)
    file = cache_folder() / "peaks" / f"{_key(device)}.json"
    if not refresh and (found := _read(file)) is not None:
        return found
    measured = measure(device, progress)
    try:
        write_text_atomic(file, json.dumps({"format": FORMAT, **measured.to_dict()}, indent=1))
    except OSError as error:
        warnings.warn(
            f"peaks: {file}: not kept ({error.strerror}); they will be measured again", stacklevel=2
        )
    return measured


def check_device(device: torch.device | str) -> torch.device:
    """The device with its index. ValueError for unknown ones, Unsupported for a GPU that is not
    here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        name = device.type if isinstance(device, torch.device) else str(device)
        check_choice("device", name.partition(":")[0], ("cpu", "cuda"))
        raise ValueError(f"device: got {name!r}, valid are 'cpu', 'cuda' and 'cuda:1'")
    if found.type == "cpu":
        return torch.device("cpu")
    if (count := torch.cuda.device_count()) <= (found.index or 0):
        raise Unsupported(
            f"device: got {str(device)!r}, torch sees {count} GPUs; valid here is 'cpu'"
            + (f" or 'cuda:0' to 'cuda:{count - 1}'" if count else "")
        )
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def cache_folder() -> Path:
    """Where effattn keeps what it can measure again: $EFFATTN_CACHE, $XDG_CACHE_HOME/effattn or
    ~/.cache/effattn."""
    if given := os.environ.get("EFFATTN_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effattn"


def measure(device: torch.device, progress: Callable[[str], None] | None = None) -> Peaks:
    """The peaks of `device`, measured now: bandwidths, matrix products by dtype, launches; in
    bytes, operations and seconds. progress: called with the name of what is measured next."""
    tell = progress or (lambda name: None)
    clock = Clock(device)
    rates = {}
    for name in ("copy", "read", "write"):
        tell(f"{name} bandwidth")
        rates[f"{name}_bytes_per_s"] = max(
            filter(None, (_bandwidth(name, size, clock) for size in _sizes(device))), default=None
        )
    flops = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        tell(f"{name} products")
        flops[name] = _matmul(dtype, clock)
    tell("launches")
    return Peaks(
        device=_name(device),
        kind=_kind(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "torch": torch.__version__,
            "triton": environment.module_version("triton"),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "hip": torch.version.hip if device.type == "cuda" else None,
        },
        matmul_flops=flops,
        launch_seconds=_launch(clock),
        **rates,
    )


def _kind(device: torch.device) -> Literal["cpu", "cuda", "rocm"]:
    return "cpu" if device.type == "cpu" else "rocm" if torch.version.hip else "cuda"


def _name(device: torch.device) -> str:
    return (
        environment.processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    )


def _sizes(device: torch.device) -> list[int]:
    """Bytes of the buffers: 8 and 16 times the last cache, at least 128 MiB; less where memory is
    short.
    """
    cache = last_level_cache(device)
    free = available_bytes(device)
    most = 2**62 if free is None else free // 4  # copy needs two buffers
    return sorted({min(most, max(128 * 2**20, times * cache)) // 4 * 4 for times in (8, 16)})


def _best(call: Callable[[], object], clock: Clock, least: int = 5) -> float:
    """The shortest time of `BUDGET` seconds' worth of calls, in seconds."""
    clock(call)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < BUDGET:
        times.append(clock(call))
    return min(times)


def _bandwidth(name: str, size: int, clock: Clock) -> float | None:
    """Bytes per second; None where the memory does not suffice."""
    try:
        one = torch.ones(size // 4, device=clock.device)
        two = torch.ones_like(one) if name == "copy" else one
        calls = {
            "copy": lambda: bandwidth.copy(one, two),
            "read": lambda: bandwidth.read(one),
            "write": lambda: bandwidth.write(one, 1.0),
        }
        return (2 if name == "copy" else 1) * size / _best(calls[name], clock)
    except torch.OutOfMemoryError:
        return None


def _matmul(dtype: torch.dtype, clock: Clock) -> float | None:
    """Operations per second of square products, sizes doubling as long as one takes less than
    `LONGEST` seconds and the rate still grows; None where torch has none for this dtype."""
    best, size = None, SMALLEST
    product = torch.mm if dtype.is_floating_point else getattr(torch, "_int_mm", None)
    settings = torch.backends.cuda.matmul
    precision, settings.fp32_precision = settings.fp32_precision, "ieee"  # float32 means float32
    try:
        # the first size may take long, since a library loads its kernels for it
        while product is not None and size <= 16384:
            a, b = (_numbers(size, dtype, clock.device) for _ in range(2))
            seconds = clock(lambda: product(a, b))  # noqa: B023  called at once
            if size > SMALLEST and seconds > LONGEST:
                break
            rate = 2 * size**3 / _best(lambda: product(a, b), clock, least=3)  # noqa: B023
            if best is not None and rate < 0.9 * best:
                break
            best, size = max(best or 0, rate), 2 * size
    except (RuntimeError, NotImplementedError):
        # torch's words for a dtype that a device has no product for
        pass
    finally:
        settings.fp32_precision = precision
    return best


def _numbers(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(size, size). Random on a GPU, which is faster on numbers that are alike (13 % on an H200, by
    zeros) since they take less power; on a CPU it makes no difference, and ones are made sooner."""
    if device.type == "cpu":
        return torch.ones(size, size).to(dtype)
    return torch.randn(size, size, device=device).to(dtype)


def _launch(clock: Clock, count: int = 500) -> float:
    """Seconds from one launch to the next, when nothing else is to be done."""

    def many():
        for _ in range(count):
            bandwidth.launch(clock.device)

    return _best(many, clock) / count


def _key(device: torch.device) -> str:
    """A file name for (device, threads, torch): legible, and unique by a hash of them."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    parts = (_name(device), _kind(device), str(threads), torch.__version__)
    legible = re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-")[:40]
    return f"{legible}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def _read(file: Path) -> Peaks | None:
    """None for a file that is absent, or not what was written: it is measured again."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        current = isinstance(values, dict) and values.pop("format", None) == FORMAT
        return Peaks.from_dict(values) if current else None
    except (OSError, ValueError):
        return None
