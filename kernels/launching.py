"""Launches of jitted kernels that the host has made before: what Triton's binder finds out of the
arguments is remembered by what it depends on, so that a decoding step does not pay for it again.

    fixed = constants(BLOCK_N=64, num_warps=4)
    launch(attend, (splits, kv_heads, batch), (q, k, v, *numbers), fixed)

A compiled kernel depends on each pointer's dtype and whether it is a multiple of 16 bytes, on the
type of each number, on whether those that are specialised on are 1 or multiples of 16, and on its
constants and options. With the same of all of these the binder would choose the same kernel, which
is then called through Triton's own `compiled[grid](...)` (48 arguments: 19 µs of Python become 6).
Anything else goes the ordinary way: the first launch, Triton's interpreter, a graph that is being
compiled, hooks before a launch, numbers beyond 32 bits, and AMD, where a pointer's storage decides
too. Triton's own settings (`knobs`) are read when a kernel is bound."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # of Triton's i32: a number beyond has another type
ALIGNED = 16  # bytes, to a multiple of which Triton specialises pointers
MOST = 1024  # launches of a kernel that are found by their numbers: strides may grow at each step
_known: dict[int, _Launches] = {}  # by the kernel's id: a kernel lives as long as its module


class Constants(dict):
    """Compile-time arguments and options of a kernel, by name. Nobody writes to one: it is equal to
    itself alone, and so found again in no time. Make it once for each choice (`lru_cache`)."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    @classmethod
    def of(cls, given: dict) -> Constants:
        """`given` itself, if it is one already."""
        return given if isinstance(given, cls) else cls(given)


def constants(**given) -> Constants:
    """`given`, which is found again by who it is."""
    return Constants(given)


def launch(kernel, grid: tuple[int, int, int], arguments: tuple, fixed: dict) -> None:
    """kernel[grid](*arguments, **fixed), where `arguments` are all that are no constants, in the
    kernel's order, and `fixed` its constants and options. Tensors are on the current device."""
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = _Launches(kernel, arguments)
    if known.plain or torch.version.hip is not None or torch.compiler.is_compiling():
        kernel[grid](*arguments, **fixed)
    else:
        known.launch(grid, arguments, fixed)


def forget() -> None:
    """What is known of launches: for who changes Triton's driver."""
    _known.clear()


def _pick(places: list[int]) -> Callable[[tuple], tuple]:
    """What lies at these places, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda given: tuple(given[i] for i in places)


class _Launches:
    """Where each kind of argument is among a kernel's, and what was compiled for which: tensors
    (None where one is left out), numbers that are `free`, not specialised on, and others. plain:
    there is no binder (Triton's interpreter)."""

    def __init__(self, kernel, arguments: tuple):
        self.kernel = kernel
        self.plain = not hasattr(kernel, "device_caches")
        if self.plain:
            return
        self.defaults = {p.name: p.default for p in kernel.params if p.is_constexpr}
        given = [p for p in kernel.params if not p.is_constexpr]
        self.names = {p.name for p in given}
        kinds = [
            "tensor"
            if x is None or isinstance(x, Tensor)
            else "free"
            if p.do_not_specialize
            else ""
            for p, x in zip(given, arguments, strict=False)
        ]
        places = range(len(kinds))
        self.tensors = _pick([i for i in places if kinds[i] == "tensor"])
        self.free = _pick([i for i in places if kinds[i] == "free"])
        self.special = _pick([i for i in places if not kinds[i]])
        self.compiled: dict[tuple, tuple] = {}  # by the kinds of numbers
        self.exact: dict[tuple, tuple] = {}  # the same by the numbers, which is found sooner

    def launch(self, grid: tuple[int, int, int], arguments: tuple, fixed: dict) -> None:
        """As the function `launch`."""
        free, special = self.free(arguments), self.special(arguments)
        key = [fixed] if type(fixed) is Constants else [*fixed, *fixed.values()]
        for x in self.tensors(arguments):
            if x is None:
                key.append(None)
            else:
                device = x.device
                key += x.dtype, x.data_ptr() % ALIGNED
        key = (device, *key, *map(type, free))
        narrow = not free or -LARGEST <= min(free) <= max(free) <= LARGEST
        if not narrow or self.kernel.pre_run_hooks:
            self.kernel[grid](*arguments, **fixed)
            return
        found = self.exact.get((key, special)) or self._found(key, special, grid, arguments, fixed)
        if found is not None:
            compiled, rest = found
            compiled[grid](*arguments, *rest)

    def _found(self, key: tuple, special: tuple, grid, arguments: tuple, fixed: dict):
        """What was compiled for other numbers of the same kinds: strides may grow at each step.
        None where Triton was asked, and has launched."""
        kinds = key, tuple(map(_kind, special))
        found = self.compiled.get(kinds)
        if found is None:
            compiled = self.kernel[grid](*arguments, **fixed)
            if compiled is None or None in kinds[1] or not self.names.isdisjoint(fixed):
                return None
            rest = tuple(fixed.get(name, default) for name, default in self.defaults.items())
            self.compiled[kinds] = compiled, rest
            return None
        if len(self.exact) >= MOST:
            self.exact.clear()
        self.exact[key, special] = found
        return found


def _kind(x) -> tuple | None:
    """What Triton specialises on in a number; None where it is none, or wider than 32 bits."""
    if type(x) is float:
        return (float,)
    return (x == 1, x % ALIGNED == 0) if type(x) is int and -LARGEST <= x <= LARGEST else None
