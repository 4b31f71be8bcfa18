"""Launches that are remembered (`launching`): the kernel that Triton's own binder would choose,
with its arguments, for whatever a launch brings. The binder is real, on a GPU that is not there.

`test_launching` runs it in a process without TRITON_INTERPRET, which triton reads once."""

from __future__ import annotations

import contextlib
import random
from itertools import product

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from effattn.kernels import launching
from effattn.kernels.launching import constants, launch

NUMBERS = (0, 1, 2, 15, 16, 32, 48, 100, 2**31 - 1, 2**31, 2**40, -1, -16)
FREE = (0, 1, 7, 16, 2**31 - 1, 2**31, -(2**31), 0.5, 1.0, 3)


def kernel_of(x_ptr, y_ptr, stride, size, free, more, D: tl.constexpr = 4, FLAG: tl.constexpr = 0):
    """Its body is never compiled."""


class Compiled:
    """What was compiled, and how it was run."""

    function, packed_metadata = None, ()
    __getitem__ = CompiledKernel.__getitem__

    def __init__(self, signature, constexprs, attrs, options):
        self.what, self.ran = (dict(signature), constexprs, attrs, options), []

    def _init_handles(self):
        pass

    def launch_metadata(self, *args):
        pass

    def run(self, g0, g1, g2, stream, function, packed, metadata, enter, leave, *args):
        self.ran.append(((g0, g1, g2), args))


class Driver:
    """What a launch asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0


@contextlib.contextmanager
def installed():
    """A kernel, and what sets attributes until the end."""

    def compile(self, key, signature, device, constexprs, options, attrs, warmup):
        found = self.device_caches[device][0][key] = Compiled(signature, constexprs, attrs, options)
        return found

    driver.set_active(Driver())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", compile)
        launching.forget()
        yield JITFunction(kernel_of, do_not_specialize=["free", "more"]), patch


def asked(kernel, *arguments, **fixed):
    """The kernel that Triton's own launch runs, and the run."""
    return kernel[2, 3, 1](*arguments, **fixed), ((2, 3, 1), arguments)


def compiled(kernel) -> list[Compiled]:
    return list(kernel.device_caches[0][0].values())


def runs(kernel) -> int:
    return sum(len(each.ran) for each in compiled(kernel))


def held(kernel, *arguments, **fixed):
    """Launches twice, the second time without the binder where that may be; both are the launch
    that Triton would make."""
    truth = asked(kernel, *arguments, **fixed)[0]
    wanted = truth.ran[-1]
    for _ in range(2):
        before, count = runs(kernel), len(truth.ran)
        launch(kernel, (2, 3, 1), arguments, fixed)
        assert runs(kernel) == before + 1 == before + len(truth.ran) - count
        (grid, given), (same, bound) = truth.ran[-1], wanted
        assert grid == same
        assert len(given) == len(bound)
        assert all(x is y or x == y for x, y in zip(given, bound, strict=True))


def any_launch_is_the_binders(kernel, patch):
    memory = torch.zeros(4096)
    pointers = [memory, memory[1:], memory[4:], memory.half(), memory.long(), None]
    chosen = random.Random(0)
    cases = list(product(pointers, (memory, memory[3:]), NUMBERS, NUMBERS, FREE, FREE))
    for case in chosen.sample(cases, 300):
        held(kernel, *case, **chosen.choice([{}, {"D": 16}, {"FLAG": 1, "D": 8}]))


def options_are_told_apart(kernel, patch):
    memory = torch.zeros(64)
    given = (memory, memory, 1, 2, 3, 4)
    for _ in range(2):
        for fixed in ({"num_warps": 2}, {"num_warps": 4}, {"D": 2}, {}):
            launch(kernel, (1, 1, 1), given, fixed)
    assert len(compiled(kernel)) == 4
    assert [len(each.ran) for each in compiled(kernel)] == [2] * 4
    assert {each.what[3].num_warps for each in compiled(kernel)} == {2, 4}


def the_binder_is_asked_once(kernel, patch):
    """And again for hooks, numbers beyond 32 bits, AMD, and what is compiled."""
    memory, fixed, count = torch.zeros(64), constants(D=16, num_warps=4), [0]
    whole = JITFunction.run

    def run(self, *args, **options):
        count[0] += 1
        return whole(self, *args, **options)

    patch.setattr(JITFunction, "run", run)

    def launches(stride=48, free=5) -> int:
        count[0] = 0
        launch(kernel, (1, 1, 1), (memory, None, stride, 3, free, 0.5), fixed)
        return count[0]

    assert [launches(), launches(), launches(free=6), launches(64), launches(64)] == [1, 0, 0, 0, 0]
    assert launches(free=2**31) == launches(free=2**31) == 1
    assert launches(stride=2**33) == launches(stride=2**33) == 1
    seen = []
    kernel.add_pre_run_hook(lambda *args, **options: seen.append(args))
    assert launches() == 1
    assert len(seen) == 1
    kernel.pre_run_hooks.clear()
    assert launches() == 0
    patch.setattr(torch.version, "hip", "7.0")
    assert launches() == 1
    patch.setattr(torch.version, "hip", None)
    patch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert launches() == 1


def what_is_remembered_is_bounded(kernel, patch):
    patch.setattr(launching, "MOST", 8)
    memory, fixed = torch.zeros(64), constants(D=16)
    for stride in range(2, 60):
        launch(kernel, (1, 1, 1), (memory, memory, stride, 3, 0, 0), fixed)
    known = launching._known[id(kernel)]
    assert len(known.exact) <= 8
    assert len(known.compiled) == len(compiled(kernel)) == 2
    assert runs(kernel) == 58


CASES = (
    any_launch_is_the_binders,
    options_are_told_apart,
    the_binder_is_asked_once,
    what_is_remembered_is_bounded,
)

if __name__ == "__main__":
    for case in CASES:
        with installed() as (kernel, patch):
            case(kernel, patch)
        print(case.__name__)
