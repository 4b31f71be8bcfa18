"""Kernels that are compiled where there is no GPU, in a cache that travels to where there is one.

Triton looks a kernel up by a hash of

    itself       every Python file of its compiler and language, and its shared library, which is
                 another one for each version of Python: the cache is made with the same wheel
    the source   the kernel's text and line number, and those of all that it calls
    the launch   types of the arguments, which of them are multiples of 16 or 1, compile-time values
    the options  num_warps, num_stages and others, in part filled in by the backend
    the target   sm_90, and what its ptxas says of its own version
    environment  some variables that change what is compiled

and not by where the files are. So the launches of the day's steps, made here on a GPU that is not
there (tests/kernels/fake_gpu.py) through Triton's own launcher and compiler, leave what the same
launches look for there. Only the lists of files that an entry consists of name folders, and are
written anew when a cache is unpacked."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench.day.settings import ROOT, Day
from effattn.kernels import bitmask, sparse24

MANIFEST, GROUP = "manifest.json", "__grp__"
KEPT = (".cubin", ".json")  # what a launch reads; an entry's other files are for people
STEPS = ("versions", "ceilings", "correctness", "headlines", "tuning")


@cache
def versions() -> dict[str, str]:
    """What decides whether a cache fits, beside the kernels' own sources."""
    import triton
    from triton._C import libtriton

    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": triton.__version__,
        "library": hashlib.sha256(Path(libtriton.__file__).read_bytes()).hexdigest()[:16],
    }


def build(file: Path, arch: str, only: tuple[str, ...] = (), tiny: bool = False) -> str:
    """Compiles what the steps launch on `arch` and writes the cache to `file`; says what it did."""
    with tempfile.TemporaryDirectory(prefix="effattn-cache-") as folder:
        with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}):
            seen, failed = rehearse(arch, "machine", only or STEPS, tiny)
        count = pack(Path(folder), file, arch)
    said = "".join(f"\nnot compiled  {name}: {why}" for name, why in failed.items())
    size = file.stat().st_size / 2**20
    return f"{file}: {count} kernels of {len(seen.launches)} functions, {size:.1f} MiB{said}"


def rehearse(arch: str, depth: str, only: tuple[str, ...], tiny: bool, few: int | None = None):
    """Launches all that the steps would, on a GPU that is not there: (what was seen, {job: why it
    failed}). depth: as in `fake_gpu.install`; few: jobs of a step, at most."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import fake_gpu

    from bench.day import headlines, launching, steps

    headlines.cases()  # made of numbers, which there are none of below
    fake_gpu.install(depth)
    failed = {}
    with (
        fake_gpu.tensors(),
        fake_gpu.on(arch) as device,
        fake_gpu.undriven(),
        mock.patch.object(sparse24, "pack", _packed),
        mock.patch.object(bitmask, "pack", _masked),
        launching.watched() as seen,
    ):
        day = Day(str(device), tiny)
        for step in steps.STEPS:
            module = step.load() if step.name in only else None
            for name in module.names(day)[:few] if module else ():
                try:
                    module.launch(name, day)
                except Exception as error:  # of any kind: the others go on
                    failed[f"{step.name} {name}"] = f"{type(error).__name__}: {error}"[-300:]
    return seen, failed


def _packed(weight: Tensor) -> sparse24.Packed:
    """What `sparse24.pack` makes of a weight, but for its numbers, which it would look at."""
    outputs, inputs = weight.shape
    indices = torch.empty(outputs, inputs // 8, dtype=torch.uint8, device=weight.device)
    return sparse24.Packed(weight.new_empty(outputs, 2, inputs // 4), indices)


def _masked(weight: Tensor) -> bitmask.Packed:
    """The same of `bitmask.pack`, half of the weight being zero."""
    outputs, inputs = weight.shape
    like = {"device": weight.device}
    return bitmask.Packed(
        weight.new_empty(outputs * inputs // 2),
        torch.empty(outputs, inputs // 8, dtype=torch.uint8, **like),
        torch.empty(outputs, bitmask.segments(inputs), dtype=torch.int32, **like),
    )


def entries(folder: Path) -> Iterator[Path]:
    """The folders of a cache that hold a kernel."""
    return (file.parent for file in sorted(folder.glob(f"*/{GROUP}*.json")))


def pack(folder: Path, file: Path, arch: str) -> int:
    """Writes a cache's kernels to one file; returns how many there are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new, count = file.with_suffix(".new"), 0
    with zipfile.ZipFile(new, "w", zipfile.ZIP_LZMA) as archive:
        for entry in entries(folder):
            count += 1
            for one in sorted(entry.iterdir()):
                if one.suffix in KEPT and not one.name.startswith(GROUP):
                    archive.write(one, f"{entry.name}/{one.name}")
        archive.writestr(MANIFEST, json.dumps({**versions(), "arch": arch, "kernels": count}))
    os.replace(new, file)
    return count


def unpack(file: Path, folder: Path) -> str:
    """Puts the kernels of `file` where Triton looks for them; says whether it will find them. A
    file that is no cache is said to be none, and the kernels are compiled as they are needed."""
    try:
        with zipfile.ZipFile(file) as archive:
            made = json.loads(archive.read(MANIFEST))
            names = [name for name in archive.namelist() if name != MANIFEST]
            archive.extractall(folder, names)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        return f"cache  {file}: it is not read ({error}); kernels are compiled as they are needed"
    for entry in {folder / Path(name).parent for name in names}:
        (listed,) = entry.glob("*.json")
        paths = {one.name: str(one) for one in entry.iterdir()}
        group = entry / f"{GROUP}{listed.name}"
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    return f"cache  {file}: {_fits(made)}"


def _fits(made: dict) -> str:
    """Whether kernels with this manifest are found here, in words."""
    here = versions()
    differing = [
        f"{name} {made.get(name)}, here {here[name]}"
        for name in here
        if made.get(name) != here[name]
    ]
    if differing:
        return f"made for {'; '.join(differing)}: nothing will be found, all is compiled anew"
    return f"{made['kernels']} kernels for {made['arch']}, of these versions"
