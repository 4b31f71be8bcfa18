"""Kernels can be launched: each with every option that its Python entry can pass, on four GPUs that
are not there (`fake_gpu`); and what a user's calls launch. The cases are those of `launches` and
`user_launches`. A process takes 10 to 40 seconds on a quiet core, mostly in Triton's front end:
they have the mark `launch`, which `make kernels` and so CI runs beside the compile check."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

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


def test_loops_that_are_unrolled_are_counted_by_names():
    """Triton 3.6 takes an entry of a tuple, which is no constexpr by itself, in other places only;
    `make gpu-versions` runs it, CI does not."""
    folder = Path(effattn.kernels.__path__[0])
    found = {
        f"{file.name}:{number}"
        for file in folder.rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if "static_range(" in line and "[" in line.split("static_range(")[1]
    }
    assert not found


# names of cases begin so; a process each
OTHERS = "lsh,topk,gated,ragged,vq,linformer,monarch,2:4,bitmask,bandwidth"
KERNELS = ("flash", "decode", "latent", "packed", "linear", OTHERS)
CALLS = ("backend", "cache", "model", "generate", "more")


def in_a_process(*command: str) -> dict:
    """What a script of this folder prints, run where Triton compiles; its last line is JSON."""
    variables = {x: os.environ[x] for x in os.environ if x != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parent,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.launch
def test_a_gpu_that_is_not_there_finds_what_a_real_one_would():
    assert in_a_process("faulty.py") == {}


@pytest.mark.launch
@pytest.mark.parametrize("parts", KERNELS)
def test_kernels_launch_on_every_gpu(parts):
    found = in_a_process("launches.py", parts)
    assert found["failed"] == {}
    assert sum(found["launches"].values()) > 100


@pytest.mark.launch
@pytest.mark.parametrize("gpu", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", CALLS)
def test_what_a_user_calls_launches_and_steps_wait_for_nothing(parts, gpu):
    """One GPU of each maker: the kernels are those of above, which are launched on all four."""
    found = in_a_process("launches.py", parts, "front", gpu)
    assert found["failed"] == {}
    assert sum(found["launches"].values()) > 20


def test_every_case_is_part_of_a_process():
    import user_launches  # adds cases
    import user_steps
    from launches import CASES

    assert user_launches
    assert user_steps
    assert not [
        x for x in CASES if not x.startswith(tuple(",".join((*KERNELS, *CALLS)).split(",")))
    ]
