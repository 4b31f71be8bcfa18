"""Kernels can be launched."""

from __future__ import annotations

import importlib
import os
import pkgutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

import effattn.kernels

# What the launcher that Triton generates for a kernel assigns before it reads the arguments, reads
# from around it, or takes itself (3.6 to 3.9). An argument of that name is lost.
RESERVED = {
    "params",
    "specialization",
    "options",
    "backend",
    "specialize_impl",
    "JITCallable",
    "grid",
    "warmup",
    "debug",
    "instrumentation_mode",
    "device",
    "device_type",
    "stream",
}


def jitted():
    for module in pkgutil.walk_packages(effattn.kernels.__path__, "effattn.kernels."):
        for function in vars(importlib.import_module(module.name)).values():
            if isinstance(function, KernelInterface):
                yield function


def test_no_argument_has_a_name_that_launches_use_themselves():
    found = {f.fn.__name__: RESERVED & set(f.arg_names) for f in jitted()}
    assert len(found) > 60
    assert not {name: names for name, names in found.items() if names}
    assert not [f.fn.__name__ for f in jitted() if any(x[:8] == "default_" for x in f.arg_names)]
