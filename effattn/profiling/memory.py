"""Memory: what is free, what a stretch of code needs at most, and whether the cost model foresaw
it.

    with PeakMemory("cpu") as peak:
        model(tokens)
    peak.bytes
    check_prediction(model, batch=1, tokens=4096)
"""

from __future__ import annotations

import ctypes
import os
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from effattn.profiling.cost import model_cost


def available_bytes(device: torch.device) -> int | None:
    """Memory in bytes that can still be allocated on `device`; None where the system does not
    say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )
    group = Path("/sys/fs/cgroup")  # a container's own limit is not in /proc/meminfo
    try:
        limit, used = (
            (group / "memory.max").read_text().strip(),
            int((group / "memory.current").read_text()),
        )
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left = int(limit) - used + int(stat["inactive_file"])  # "max" is no number: no limit
    except (OSError, ValueError, KeyError):
        return free
    return left if free is None else min(free, left)


class PeakMemory:
    """Context manager. Afterwards `bytes` is the most that was allocated at once inside, over what
    was at entry.

    CUDA and ROCm: torch's allocator statistics. CPU: every allocation and release of torch's CPU
    allocator, as its profiler records them, in order: exact and the same every time, where resident
    memory is neither. What libraries allocate by themselves (BLAS's packing buffers) is in neither.
    Costs some time per operation: do not time inside, and do not nest it. `source` says which it
    was.

    On a CPU, only what was allocated inside of this or an earlier `PeakMemory` is seen to be freed.
    A step that replaces what it found (a cache that grows by copying) is therefore measured the
    second time: a first step under a `PeakMemory` makes the tensors known."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"device: got {str(device)!r}, valid are 'cpu' and 'cuda' (ROCm's name in torch, "
                "too)"
            )
        self.bytes: int | None = None
        self.source = f"torch's {'CPU' if self.device.type == 'cpu' else torch_gpu()} allocator"

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            # it tells stderr of every start and stop otherwise
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(
                activities=activities, profile_memory=True, acc_events=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        changes = cpu_changes(self._profile)
        del self._profile
        self.bytes = max(0, *accumulate(changes), 0)


def torch_gpu() -> str:
    """What torch was built for."""
    return "ROCm" if torch.version.hip else "CUDA"


def cpu_changes(profile: torch.profiler.profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU, in order."""
    cpu = torch.autograd.DeviceType.CPU
    events = [
        event
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == cpu
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@torch.no_grad()
def check_prediction(model: nn.Module, batch: int, tokens: int) -> dict[str, dict[str, float]]:
    """The cost model's `peak_bytes` beside what a prefill of `tokens` random tokens and a decoding
    step after it need.

    {"prefill": {"predicted_bytes", "measured_bytes", "ratio"}, "decode": the same}; ratio is
    predicted over measured. Measured are weights, and the state that the call starts with, as they
    lie in memory, plus `PeakMemory` around the call; logits of the last position, as in generate().
    The step is the second one: the first still finds the cache as the prefill left it (a windowed
    layer's ring is a view of all tokens). The model runs in eval mode, as it is."""
    weight = model.get_input_embeddings().weight
    ids = torch.randint(
        0, weight.shape[0], (batch, tokens), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(weight.device)
    held = held_bytes(*model.parameters(), *model.buffers())
    found, cache, training = {}, None, model.training
    model.eval()
    try:
        for name, given, past in (
            ("prefill", ids, 0),
            ("first", ids[:, :1], tokens),
            ("decode", ids[:, :1], tokens + 1),
        ):
            before = held + held_bytes(*_tensors(cache))
            with PeakMemory(weight.device) as peak:
                out = model(
                    input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache = out.past_key_values
            del out
            measured = before + peak.bytes
            predicted = model_cost(model, batch, given.shape[1], past).peak_bytes
            found[name] = {
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "ratio": predicted / measured,
            }
    finally:
        model.train(training)
    del found["first"]
    return found


def held_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of memory that these tensors keep from being freed: whole storages, each once."""
    storages = {one.untyped_storage() for one in tensors}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(cache) -> list[torch.Tensor]:
    """The keys and values of transformers' cache; none of None."""
    layers = [] if cache is None else cache.layers
    return [one for layer in layers for one in (layer.keys, layer.values) if one is not None]


def give_memory_back() -> None:
    """Returns freed memory to the system, where the C library can: it keeps hundreds of megabytes
    between layers.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
