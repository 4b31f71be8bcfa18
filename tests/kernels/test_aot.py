"""The ahead-of-time check finds what it is for: spills, products outside of the matrix unit, what
does not compile.

The kernels here are small ones of its own, compiled in a process without TRITON_INTERPRET; `make
kernels` checks those that ship."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

# triton reads it once a process, and other tests here need its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from effattn.kernels import aot

KERNELS = '''
"""Small kernels with one fault each, and the check run on them through the command line."""

import json, os, sys
import triton
import triton.language as tl
from typer.testing import CliRunner
from effattn.recipes import cli
from effattn.kernels import aot


@triton.jit
def product(x_ptr, y_ptr, out_ptr, stride,
            M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * stride + k[None, :])
    y = tl.load(y_ptr + k[:, None] * stride + n[None, :])
    if EXACT:  # fp32 without tensor cores
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(out_ptr + m[:, None] * stride + n[None, :], tl.dot(x, y, input_precision="ieee"))


@triton.jit
def broken(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N + 1)))


def variant(name, m, n, k, exact=False, forward=True, dots=True, num_warps=4):
    return dict(
        name=name, kernel=product, forward=forward, dots=dots, num_warps=num_warps, num_stages=1,
        signature=dict(x_ptr="*bf16", y_ptr="*bf16", out_ptr="*fp32", stride="i32:16",
                       M="constexpr", N="constexpr", K="constexpr", EXACT="constexpr"),
        constexprs=dict(M=m, N=n, K=k, EXACT=exact),
    )


WANTED = [
    variant("small", 16, 32, 32),
    variant("wide", 64, 64, 32),
    variant("spills", 64, 256, 64, num_warps=1),
    variant("backward may spill", 64, 256, 64, num_warps=1, forward=False),
    variant("no tensor cores", 16, 32, 32, exact=True),
    variant("none wanted", 16, 32, 32, exact=True, dots=False),
    dict(name="broken", kernel=broken,
         signature=dict(x_ptr="*bf16", out_ptr="*bf16", N="constexpr"),
         constexprs=dict(N=16), forward=True, dots=False, num_warps=4, num_stages=1),
]
hidden = ("kernel", "constexprs")
shipped = {
    arch: [
        (folder, {key: each[key] for key in each if key not in hidden})
        for folder, each in aot.variants(arch)
    ]
    for arch in aot.ARCHES
}
aot.variants = lambda arch: [
    ("tests", each) for each in WANTED if arch == "sm_90" or each["name"] == "small"
]
os.cpu_count = lambda: 1  # here, where `variants` is ours
as_json = CliRunner().invoke(cli.app, ["kernels", "--arch", "sm_90", "--arch", "gfx942", "--json"])
WANTED = WANTED[:1]
as_table = CliRunner().invoke(cli.app, ["kernels", "--arch", "sm_90"])
print(json.dumps(dict(shipped=shipped, results=json.loads(as_json.stdout), code=as_json.exit_code,
                      table=as_table.stdout, table_code=as_table.exit_code)))
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the script above prints; triton's cache is a fresh one, so everything is compiled."""
    folder = tmp_path_factory.mktemp("aot")
    script = folder / "faulty.py"
    script.write_text(KERNELS)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.launch
def test_each_fault_is_found_and_nothing_else(run):
    found = {(each["arch"], each["name"]): each for each in run["results"]}
    problems = {name: each["problem"] for (arch, name), each in found.items() if arch == "sm_90"}
    assert run["code"] == 1
    assert (
        problems["small"]
        is problems["wide"]
        is problems["backward may spill"]
        is problems["none wanted"]
        is None
    )
    assert problems["spills"].startswith("spills ")
    assert "outside of the matrix unit" in problems["no tensor cores"]
    assert problems["broken"].startswith("does not compile: ")
    assert found["gfx942", "small"]["problem"] is None


@pytest.mark.launch
def test_the_numbers_are_the_kernels(run):
    found = {(each["arch"], each["name"]): each for each in run["results"]}
    small, spills = found["sm_90", "small"], found["sm_90", "spills"]
    assert set(small["instructions"]) == {"HMMA"}  # 16 rows: Hopper's wider instruction takes 64
    assert set(found["sm_90", "wide"]["instructions"]) == {"HGMMA"}
    assert set(found["gfx942", "small"]["instructions"]) == {"v_mfma"}
    assert 16 <= small["registers"] < 128
    assert small["spills"] == 0
    assert spills["spills"] == found["sm_90", "backward may spill"]["spills"] > 0
    assert small["occupancy"] == small["blocks"] * 4 / 64
    assert found["sm_90", "broken"]["registers"] is None
    assert found["sm_90", "none wanted"]["instructions"] == {}


@pytest.mark.launch
def test_the_table_says_which_instruction(run):
    assert run["table_code"] == 0
    assert "HMMA" in run["table"]
    assert "1 variants, 0 failed" in run["table"]


@pytest.mark.launch
def test_every_kernel_folder_ships_variants_of_the_right_form(run):
    for shipped in run["shipped"].values():
        assert {"decode", "flash"} <= {folder for folder, _ in shipped}
        names = [(folder, variant["name"]) for folder, variant in shipped]
        assert len(set(names)) == len(names)
        for _, variant in shipped:
            assert set(variant) - {"loop"} == {
                "name",
                "signature",
                "num_warps",
                "num_stages",
                "forward",
                "dots",
            }


def test_an_interpreting_process_starts_another(monkeypatch):
    """The interpreter compiles nothing, so the command runs itself again; a bad name is said
    before.
    """
    from typer.testing import CliRunner

    from effattn.recipes import cli

    started = []

    def start(command, env):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", start)
    assert CliRunner().invoke(cli.app, ["kernels", "--arch", "sm_90", "--json"]).exit_code == 1
    ((command, env),) = started
    assert command[1:] == ["-m", "effattn.recipes.cli", "kernels", "--arch=sm_90", "--json"]
    assert "TRITON_INTERPRET" not in env
    for wrong, said in ((["--arch", "sm_91"], "sm_90"), (["--only", "pakced"], "a part of")):
        result = CliRunner().invoke(cli.app, ["kernels", *wrong])
        assert result.exit_code == 2
        assert "did you mean '" in result.output
        assert said in result.output
    assert len(started) == 1
    report = ["kernels", "--report", "--only", "packed int4", "--output", "r.json"]
    assert CliRunner().invoke(cli.app, report).exit_code == 1
    assert started[1][0][4:] == [
        "--arch=sm_90",
        "--only=packed int4",
        "--report",
        "--output=r.json",
    ]
    with pytest.raises(
        ValueError, match=r"arch: got 'sm_91' \(did you mean 'sm_90'\?\), valid are 'sm_80'"
    ):
        aot.variants("sm_91")


def test_a_judged_kernel_is_not_disassembled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    calls = []

    def read(asm):
        calls.append(asm)
        return 32, 0, {"v_mfma": 2}

    monkeypatch.setattr(aot, "read_amdgcn", read)
    kernel = SimpleNamespace(hash="ab12", asm={}, metadata=SimpleNamespace(shared=1024))
    variant = dict(name="x", num_warps=4, forward=True, dots=True, signature={"x": "*bf16"})
    kernel.asm["ttgir"] = ""
    first = aot.judge(kernel, variant, "gfx942")
    assert aot.judge(kernel, variant, "gfx942") == first
    assert (first.registers, first.instructions, len(calls)) == (32, {"v_mfma": 2}, 1)
    kernel.hash = "cd34"  # another kernel
    aot.judge(kernel, variant, "gfx942")
    assert len(calls) == 2


def test_reading_what_the_tools_print():
    usage = " Function attend:\n  REG:111 STACK:40 SHARED:1024 LOCAL:8 CONSTANT[0]:720 TEXTURE:0"
    assert aot.parse_usage(usage) == (111, 48)
    assert aot.parse_usage("") == (None, None)
    sass = (
        "/*0*/ HMMA.16816.F32.BF16 R4, R8 ;\n HGMMA.64x64x16.F32 R2 ;\n UTCHMMA gdesc[UR4] ;\n "
        "HMMA.1688 R1 ;\n FFMA R0"
    )
    assert aot.count_instructions(sass) == {"HMMA": 2, "HGMMA": 1, "UTCHMMA": 1}
    assert aot.count_instructions("\tv_mfma_f32_16x16x16_bf16 v[2:5], v[0:1]\n\tv_fma_f32 v0") == {
        "v_mfma": 1
    }
    assert aot.count_instructions("FFMA R0, R1 ;") == {}
    assert aot.count_instructions("") is None
    text = "  .vgpr_count:     265\n; ScratchSize: 36\n v_mfma_f32_16x16x16_bf16 v0"
    assert aot.read_amdgcn({"amdgcn": text}) == (265, 36, {"v_mfma": 1})


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 32, 0, 4, 16),  # by warps
        ("sm_90", 128, 0, 4, 4),  # by registers
        ("sm_90", 255, 0, 8, 1),
        ("sm_90", 64, 71680, 4, 3),  # by shared memory, with the kilobyte that the system takes
        ("sm_80", 64, 71680, 4, 2),
        ("sm_80", 64, 164 * 1024, 4, 0),
        ("gfx942", 128, 16384, 4, 4),
        ("gfx942", 265, 0, 4, 1),
        ("sm_90", None, 0, 4, None),
    ],
)
def test_blocks_on_a_multiprocessor(arch, registers, shared, warps, blocks):
    assert aot.blocks_at_once(aot.ARCHES[arch], registers, shared, warps) == blocks
