"""What the host does in a decoding step, in µs: tensors on the CPU, Triton's binder as it is, and
launches that do nothing. What a real launch takes beyond (the driver's own call) is not in it.

python -m bench.host                      # every spec below, by torch and by Triton
python -m bench.host "sliding(window=32, sinks=4)" int8

On a CPU torch's own products are in the times of the torch path; with heads of 16 and a hundred
tokens they are small."""

from __future__ import annotations

import importlib
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

if __name__ == "__main__":  # and not where a test imports this
    os.environ.pop("TRITON_INTERPRET", None)  # triton reads it once

import torch
from triton.compiler.compiler import CompiledKernel

import effattn
import effattn.kernels
from effattn.errors import Unsupported
from effattn.interface import Backend
from effattn.kernels import flash, launching
from effattn.quant.formats import FORMATS, Format
from effattn.quant.packed.kind import Packed
from effattn.specs import parse_spec
from effattn.states.base import State

SPECS = (
    "dense",
    "sliding(window=32, sinks=4)",
    "linear",
    "performer(features=32)",
    "block(block=32)",
    "gated",
    "hybrid(window=32, sinks=2)",
    "topk(window=32, sinks=4, block=16, blocks=3)",
    "lsh(rounds=2, buckets=8, chunk=16)",
    "longformer(window=33, global_tokens=3)",
    "int8",
    "int4(group=16, residual=32)",
    "fp8",
)
HEADS, DIM, PROMPT = (4, 2, 2), 16, 300
WARM, STEPS = 40, 200


class _Driver:
    """What a launch asks of a driver."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Nothing:
    """A compiled kernel that does not run, called by Triton's own Python."""

    function, packed_metadata = None, ()
    __getitem__ = CompiledKernel.__getitem__

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *args) -> None:
        pass

    run = launch_metadata


def without_launches() -> None:
    """From now on kernels are bound to their arguments in this process, on a GPU that is not there,
    and do not run: what they would have written is anything."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    # before anybody asks: a module that comes later could be read as one of the interpreter
    for module in pkgutil.walk_packages(effattn.kernels.__path__, "effattn.kernels."):
        importlib.import_module(module.name)

    def compile(self, key, signature, device, *rest):
        self.device_caches[device][0][key] = kernel = _Nothing()
        return kernel

    driver.set_active(_Driver())
    launching.forget()
    JITFunction._do_compile = compile


def begin(spec: str) -> tuple[Backend, State]:
    """A backend, or dense attention where the spec is a format of keys, and its empty state."""
    name, options = parse_spec(spec)
    if name not in FORMATS:
        attn = effattn.backend(name, **{**options, "impl": "torch"})
        return attn, attn.new_state()
    attn = effattn.backend("dense", impl="torch")
    return attn, Packed(spec, Format.parse(spec).fit(DIM)[0]).new_state(attn)


def step_of(spec: str, impl: str) -> Callable[[], object]:
    """A call with one more token; after PROMPT tokens, of which torch has made the state."""
    attn, state = begin(spec)
    attn(*(torch.zeros(1, h, PROMPT, DIM) for h in HEADS), state=state)
    qkv = [torch.zeros(1, h, 1, DIM) for h in HEADS]
    attn.impl = impl
    return lambda: attn(*qkv, state=state)


@torch.no_grad()
def measure(spec: str, impl: str) -> float:
    """The median step of `STEPS`, in µs."""
    times = []
    allowed = SimpleNamespace(environ={"TRITON_INTERPRET": "1"})  # Triton for tensors on a CPU
    with mock.patch.object(flash, "os", allowed):
        step = step_of(spec, impl)
        for _ in range(WARM + STEPS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[WARM:])


def main(specs: list[str]) -> None:
    """Prints a table. Exits with one line about a spec that is none."""
    for spec in specs:
        try:
            begin(spec)
        except (ValueError, Unsupported) as error:
            sys.exit(f"error: {error}")
    torch.set_num_threads(1)
    without_launches()
    print("| step | torch | Triton |\n|---|---:|---:|")
    for spec in specs or SPECS:
        cells = [f"{measure(spec, impl):.0f}" for impl in ("torch", "triton")]
        print(f"| `{spec}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
