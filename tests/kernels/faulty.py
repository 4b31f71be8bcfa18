"""Launches that fail on a real GPU, each for one reason; on one that is not there they must, too.

    python tests/kernels/faulty.py

prints as JSON what is wrong with how they failed."""

from __future__ import annotations

import json

import fake_gpu
import torch
import triton
import triton.language as tl


@triton.jit
def _reserved(params, N: tl.constexpr):
    tl.store(params + tl.arange(0, N), 0.0)


@triton.jit
def _fill(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), 0.0)


@triton.jit
def _adds(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(x_ptr, tl.load(y_ptr) + (tl.arange(0, N) if N > 1 else 0))


def _launch(kernel, *tensors, grid=(1,), guard=True, **constants):
    with torch.cuda.device_of(tensors[0]) if guard else torch.no_grad():
        kernel[grid](*tensors, **constants)


def _waits(run, device):
    """Fails with what the host waits for in run(x)."""
    x = torch.empty(8, device=device)
    with fake_gpu.watch() as seen:
        run(x)
    raise RuntimeError(seen.waits)


# what is launched on a device -> what the failure says
FAULTS = {
    "a name that the launcher uses": (
        lambda x, device: _launch(_reserved, x, N=16),
        "failed to specialize argument",
    ),
    "an argument that is missing": (lambda x, device: _launch(_fill, x), "missing"),
    "code that does not compile": (lambda x, device: _launch(_adds, x, x, N=16), "store"),
    "no range of a power of two": (lambda x, device: _launch(_fill, x, N=12), "power of 2"),
    "a tensor of the host": (
        lambda x, device: _launch(_adds, x, torch.zeros(1), N=1),
        "y_ptr is on cpu",
    ),
    "another device than the current one": (
        lambda x, device: _launch(_fill, x, guard=False, N=16),
        "x_ptr is on cuda",
    ),
    "an empty grid": (lambda x, device: _launch(_fill, x, grid=(0,), N=16), "a grid of 0"),
    "too large a grid": (lambda x, device: _launch(_fill, x, grid=(1, 2**16), N=16), "65536"),
    "a value asked for": (lambda x, device: x.sum().item(), "_local_scalar_dense"),
    "a branch on a value": (lambda x, device: bool((x > 0).all()), "_local_scalar_dense"),
    "a size that depends on values": (lambda x, device: x[x > 0], "nonzero"),
    "tensors on two devices": (lambda x, device: x + torch.zeros(16), "two devices"),
    "a copy to the host": (lambda x, device: _waits(lambda x: x.cpu(), device), "cuda cpu"),
    "a copy to the device": (
        lambda x, device: _waits(lambda x: torch.arange(4).to(device), device),
        "cpu cuda",
    ),
    "a list that becomes a tensor": (
        lambda x, device: _waits(lambda x: torch.tensor([1, 2], device=device), device),
        "cpu cuda",
    ),
    "a list as an index": (lambda x, device: x[[0, -1]], "aten::empty"),
    "an index of the host": (
        lambda x, device: _waits(lambda x: x[torch.arange(3)], device),
        "cuda cpu cuda",
    ),
}


def run(device: torch.device) -> dict[str, str]:
    """{fault: what is wrong with how it failed}, empty where all is well."""
    wrong = {}
    for name, (launch, message) in FAULTS.items():
        try:
            launch(torch.empty(16, device=device), device)
            wrong[name] = "did not fail"
        except Exception as error:
            text = str(error)
            while error.__cause__ is not None:
                error = error.__cause__
                text += str(error)
            if message not in text:
                wrong[name] = text
    return wrong


if __name__ == "__main__":
    fake_gpu.install()
    found = {}
    for arch in ("sm_90", "gfx942"):
        with fake_gpu.tensors(), fake_gpu.on(arch) as there:
            found |= {f"{name}, {arch}": text for name, text in run(there).items()}
    print(json.dumps(found))
