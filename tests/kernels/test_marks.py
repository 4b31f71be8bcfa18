"""Marks that kernels are to reach in the model of an H200, on hand-made reports: each ratio and
share worked out by hand."""

from __future__ import annotations

import os

import pytest
import torch

# triton reads it once a process, and other tests here need its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from effattn.kernels import aot, hopper
from effattn.kernels.marks import MARKS, marks
from effattn.kernels.report import LoopReport, Report

SIZES = {"BLOCK_N": 64, "BLOCK_G": 32}


def made(name, clocks, fraction=1.0, blocks=2, spills=0, inner=0, forward=True, sizes=SIZES):
    """A report of "folder name" whose one loop takes `clocks` for a turn of `blocks` blocks."""
    folder, _, variant = name.partition(" ")
    taken = {"issue": clocks / 2, "memory": float(clocks)} if clocks else None
    loop = LoopReport(10, 0, 64, 0, {}, {}, "none", inner, fraction, "memory", "memory", taken)
    result = aot.Result(folder, variant, "sm_90", spills=spills, blocks=blocks)
    return Report(result, 4, "sass", [loop], forward=forward, sizes=sizes)


def found(*reports):
    return {each.what: each for each in marks(reports)}


BF16, INT8 = "decode full d128 bf16 g4", "decode packed int8 d128 g4"
RATIO, SHARE = "decode int8 against bf16", "decode bf16, of the bandwidth"


def test_a_packed_key_against_one_in_bf16():
    """1200 clocks for 2 blocks of 64 keys: 9.375 a key; 1600 for 4 of 128: 3.125."""
    packed = made(INT8, 1600, blocks=4, sizes={"BLOCK_N": 128})
    each = found(made(BF16, 1200), packed)[RATIO]
    assert each.got == pytest.approx(3.0)
    assert each.holds
    assert not found(made(BF16, 1200), made(INT8, 800))[RATIO].holds  # 1.5, and 1.6 is asked for


def test_a_packed_weight_against_a_dense_one():
    """64 outputs of 32 bytes of indices are 16,384 weights, 32 KiB in 16 bits."""
    each = found(made("sparse24 product bf16 of 1", 2000))["2:4 against dense, one row"]
    assert each.got == pytest.approx(2 * 64 * 32 * 8 / hopper.MEMORY / 1000)
    assert each.holds == (each.got >= 1.3)


def test_the_least_of_several_shares_counts():
    mark = next(one for one in MARKS if one.what.startswith("linear"))
    reports = [made(name, 100, 0.9) for name in mark.names]
    assert found(*reports)[mark.what].holds
    reports[2] = made(mark.names[2], 100, 0.5)
    assert found(*reports)[mark.what].got == 0.5
    assert not found(*reports)[mark.what].holds


def test_only_what_is_known_is_said():
    """Of marks whose variants are not there, and of what the model says nothing of: nothing."""
    assert RATIO not in found(made(BF16, 1200))
    assert RATIO not in found(made(BF16, 1200), made(INT8, None))
    assert SHARE not in found(made(BF16, 1200, fraction=None))
    assert RATIO not in found(made(BF16, 1200), made(INT8, 800, blocks=0))
    assert marks([]) == []


def test_spills_of_kernels_that_must_not():
    """Forward and decode kernels, and gradients of keys; heads of 256 and other gradients may."""
    where, inner = "bytes that a thread spills", "bytes that a thread spills in a loop"
    free = [
        made("flash backward_queries_128_bf16_full", 9, spills=8, forward=False),
        made("flash backward_keys_256_bf16_full", 9, spills=8, forward=False),
        made("linear forward_256_bf16_elu", 9, spills=8),
    ]
    assert found(*free) == {}
    assert found(made(BF16, 9), *free)[where].holds
    for name in ("flash backward_keys_128_bf16_full", "topk backward_keys_64_bf16"):
        each = found(made(BF16, 9), made(name, 9, spills=48, forward=False, inner=3))
        assert (each[where].got, each[where].holds) == (48, False)
        assert (each[inner].got, each[inner].holds) == (12, False)
    assert found(made("decode combine d64 bf16", 9, spills=4))[where].got == 4


def test_every_mark_names_variants_that_ship():
    shipped = {f"{folder} {each['name']}" for folder, each in aot.variants("sm_90")}
    assert all(set(one.names) <= shipped for one in MARKS)
