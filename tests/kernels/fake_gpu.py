"""A machine with four GPUs, none of which is there: kernels are launched on them through Triton's
own binder and front end, as on real ones, and do not run.

    fake_gpu.install()                            # once a process, before anything is launched
    with fake_gpu.tensors(), fake_gpu.on("sm_90") as device, fake_gpu.watch() as seen:
        q = torch.empty(2, 8, 1, 64, device=device, dtype=torch.bfloat16)
        attention(q, k, v, impl="triton")
    seen.launches, seen.waits                     # kernels by name; where the host waited

Three things stand in for the devices. Tensors are torch's `FakeTensor`s, which have a shape,
strides and a device and no memory: asking for a value raises, and so does an operation of tensors
on two devices. A driver tells Triton which GPU is the current one. A compiled kernel is replaced by
a check: that its grid is one a GPU takes, and that all its pointers are on the current device.

Whatever depends on values is out of reach: a launch that would read beyond its tensors is fine
here, and is what the interpreter's tests are for. Only for a process of its own, without
TRITON_INTERPRET: triton reads that once."""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import CompiledKernel, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from effattn.kernels import launching
from effattn.kernels.aot import ARCHES

DEVICES = tuple(ARCHES)  # cuda:0 to cuda:3
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
GRID = (2**31 - 1, 65535, 65535)  # the largest that CUDA and HIP take
DEPTHS = ("bind", "front", "machine")


@dataclass
class Seen:
    """What happened on the device: launches by kernel, kernels compiled, and copies that the host
    waited for."""

    launches: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)


_watching: list[Seen] = []
_current = 0  # the device that launches go to, as torch's guards set it


# ---- the devices, as torch sees them


def install(depth: str = "front") -> None:
    """From now on this process has the four GPUs.

    depth: how far a kernel that is launched the first time is compiled: bound to its arguments
    ("bind"), to Triton's own representation ("front"; once for all GPUs of a maker, where the code
    is the same), or to machine code ("machine", seconds each)."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("fake_gpu needs a process without TRITON_INTERPRET")
    assert depth in DEPTHS, depth
    driver.set_active(_Driver())
    JITFunction._do_compile = _compiler(depth)
    launching.forget()
    _register_device()
    cuda = torch.cuda
    # a torch that was built with CUDA would look for a driver
    fake_tensor.init_gpu_context = lambda device: None
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = lambda: len(DEVICES)
    cuda.current_device = lambda: _current
    cuda._exchange_device = cuda._maybe_exchange_device = _exchange_device
    cuda.get_device_properties = _properties
    cuda.get_device_capability = _capability
    # all allocations are aligned; what lies in the middle of one may not be
    FakeTensor.data_ptr = lambda self: self.storage_offset() * self.element_size()


@contextlib.contextmanager
def on(arch: str) -> Iterator[torch.device]:
    """Gives the device of that architecture; torch is one built for its maker inside. Another one
    is the current device, so that launches outside of a guard show."""
    before = torch.version.hip
    torch.version.hip = "7.0" if ARCHES[arch].target.backend == "hip" else None
    _exchange_device((DEVICES.index(arch) + 1) % len(DEVICES))
    try:
        yield torch.device("cuda", DEVICES.index(arch))
    finally:
        torch.version.hip = before


def _exchange_device(index: int) -> int:
    global _current
    before = _current
    if index >= 0:
        _current = index
    return before


def _arch(device) -> str:
    index = torch.device("cuda" if device is None else device).index
    return DEVICES[_current if index is None else index]


def _properties(device=None) -> SimpleNamespace:
    arch = _arch(device)
    return SimpleNamespace(
        name=f"no {arch}",
        multi_processor_count=PROCESSORS[arch],
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=ARCHES[arch].shared_block,
        total_memory=80 * 2**30,
        warp_size=ARCHES[arch].target.warp_size,
    )


def _capability(device=None) -> tuple[int, int]:
    number = _arch(device).removeprefix("sm_")
    return (9, 4) if number == "gfx942" else (int(number[:-1]), int(number[-1]))


def _register_device() -> None:
    """Lets a torch that was built without CUDA name its tensors' device, as operations do when they
    begin: the entry of "meta" serves, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    # std::array<std::atomic<const DeviceGuardImplInterface*>>, by c10::DeviceType
    table = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    table[cuda] = table[meta]


@contextlib.contextmanager
def tensors() -> Iterator[FakeTensorMode]:
    """All tensors made inside have no memory."""
    made = torch.tensor

    def tensor(data, *, device=None, **options):  # torch's own goes past the modes
        x = made(data, **options)
        if device is None or torch.device(device).type == "cpu":
            return x
        for seen in _watching:
            seen.waits.append("torch.tensor: cpu cuda")
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    torch.tensor = tensor
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        torch.tensor = made


def moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`module`, made outside of `tensors`, with its parameters and buffers on the device; in place,
    inside of `tensors`."""

    def there(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = torch.nn.Parameter(there(x), x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = there(x)
    return module


def backward(out: Tensor, grad: Tensor | None = None) -> None:
    """`out.backward(grad)`: torch's engine wants a driver, so its nodes are called from here, each
    as soon as all that it waits for is there."""
    waiting, nodes = Counter(), [out.grad_fn]
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                if following not in waiting:
                    nodes.append(following)
                waiting[following] += 1
    grads = {out.grad_fn: {out.output_nr: torch.empty_like(out) if grad is None else grad}}
    ready = [out.grad_fn]
    while ready:
        node = ready.pop()
        given = grads.pop(node, {})
        if hasattr(node, "variable"):
            node.variable.grad = given.get(0)
            continue
        wanted = [each for each in node.next_functions if each[0] is not None]
        for (following, place), x in zip(wanted, _call(node, given), strict=True):
            if x is not None:  # broadcast dimensions and dtypes are the engine's business
                like = following._input_metadata[place]
                x = x.sum_to_size(like.shape).to(like.dtype)
                held = grads.setdefault(following, {})
                held[place] = held[place] + x if place in held else x
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


@contextlib.contextmanager
def undriven() -> Iterator[None]:
    """`torch.autograd.grad` and `torch.Generator` do without a driver inside."""

    def grad(outputs, inputs, grad_outputs=None, **options):
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        above = [None] * len(outputs) if grad_outputs is None else grad_outputs
        above = [above] if isinstance(above, Tensor) else above
        for x in inputs:
            x.grad = None
        for out, one in zip(outputs, above, strict=True):
            backward(out, one)
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]

    class Generator:
        def __init__(self, device=None):
            pass

        def manual_seed(self, seed: int) -> None:
            """None, which torch takes for its own generator."""

    with (
        mock.patch.object(torch.autograd, "grad", grad),
        mock.patch.object(torch, "Generator", Generator),
    ):
        yield


def _call(node, given: dict[int, Tensor]) -> list[Tensor | None]:
    """What an autograd node makes of its outputs' gradients, for the inputs that have one."""
    needed = [each[0] is not None for each in node.next_functions]
    if not given:
        return [None] * sum(needed)
    run = node
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # one of Python's
        run, needed = node.apply, node.needs_input_grad
    with torch.no_grad():
        found = run(*(given.get(i) for i in range(len(node._input_metadata))))
    found = found if isinstance(found, tuple) else (found,)
    return [x for x, wanted in zip(found, needed, strict=True) if wanted]


# ---- what must not happen between two tokens


class _Watch(TorchDispatchMode):
    """Notes copies that the host waits for. (Values that are asked for raise by themselves.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and _arrives(*args, **kwargs):
            out = torch.empty(
                args[0].shape, device=kwargs["device"], dtype=kwargs.get("dtype", args[0].dtype)
            )
        else:
            out = func(*args, **kwargs)
        flat = [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]
        given = [x for x in (*flat, out) if isinstance(x, Tensor)]
        copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if not copy:  # a number that lies on the host as a tensor travels with the launch
            given = [x for x in given if x.dim() or x.is_cuda]
        elif out.is_cuda and (kwargs.get("non_blocking") or args[2:] == (True,)):
            given = []
        devices = [x.device.type for x in given]
        if _watching and len(set(devices)) > 1:
            _watching[-1].waits.append(f"{func}: {' '.join(devices)}")
        return out


def _arrives(x: Tensor, *, device=None, **options) -> bool:
    """Whether a copy goes from the host to a device. (Fake tensors that know their values would be
    copied for real.)"""
    return device is not None and device.type == "cuda" and x.device.type == "cpu"


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """Collects what happens inside, `tensors` being around it."""
    seen = Seen()
    _watching.append(seen)
    try:
        with _Watch():
            yield seen
    finally:
        _watching.pop()


# ---- the devices, as triton sees them


class _Driver:
    """What a launch asks of a driver."""

    def get_current_target(self):
        return ARCHES[DEVICES[_current]].target

    def get_current_device(self) -> int:
        return _current

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        _exchange_device(device)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", _current)


class _Kernel:
    """A compiled kernel; to run it is to check how it is launched."""

    function, packed_metadata = None, ()
    __getitem__ = CompiledKernel.__getitem__  # as a launch that is remembered calls it

    def _init_handles(self) -> None:
        pass

    def __init__(self, name: str, arg_names: list[str]):
        self.name, self.arg_names = name, arg_names

    def launch_metadata(self, grid, stream, *args) -> None:
        return None

    def run(self, grid_0, grid_1, grid_2, stream, function, packed, metadata, enter, leave, *args):
        for seen in _watching:
            seen.launches[self.name] += 1
        for size, most in zip((grid_0, grid_1, grid_2), GRID, strict=True):
            if not 1 <= size <= most:
                raise ValueError(f"{self.name}: a grid of {grid_0}, {grid_1}, {grid_2}")
        for name, x in zip(self.arg_names, args, strict=True):
            if isinstance(x, Tensor) and x.device != torch.device("cuda", _current):
                raise ValueError(
                    f"{self.name}, launched on cuda:{_current}: {name} is on {x.device}"
                )


def _compiler(depth: str):
    """In the place of `JITFunction._do_compile`, which is called once for each kind of launch."""
    done, whole = set(), JITFunction._do_compile

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):
        target = ARCHES[DEVICES[device]].target
        source = ASTSource(self, signature, constexprs, attrs)
        code = (target.backend, self.cache_key, str((signature, constexprs, attrs)))
        if depth == "machine":  # all of what Triton itself does, its cache on disk included
            whole(self, key, signature, device, constexprs, options, attrs, warmup)
        elif depth == "front" and code not in done:
            _front(source, target, options)
            done.add(code)
        for seen in _watching:
            seen.compiled[self.fn.__name__] += 1
        kernel = _Kernel(self.fn.__name__, self.arg_names)
        self.device_caches[device][0][key] = kernel
        return kernel

    return compile


def _front(source: ASTSource, target, options) -> None:
    """The first step of triton.compile: from Python to a module that Triton has verified."""
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(target, options, code, modules, context)
