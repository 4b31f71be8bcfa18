"""The report on compiled kernels, on hand-made listings: loops, widths, work, and the prediction,
each of whose terms is worked out by hand here."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

# triton reads it once a process, and other tests here need its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from effattn.kernels import hopper, listing, report, work
from effattn.kernels.listing import Instruction

SASS = """
    Function : attend
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R29], desc[UR12][R4.64] ;
        /*0020*/                   DEPBAR.LE SB0, 0x0 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   LDS.U8 R7, [R3] ;
        /*0050*/                   LDSM.16.MT88.4 R8, [R3+0x40] ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R8, R10, R12 ;
        /*0070*/              @!P0 LDGSTS.E.64 [R29], desc[UR12][R4.64] ;
        /*0080*/                   LDG.E.U16 R5, desc[UR12][R4.64] ;
        /*0090*/               @P3 BRA 0x20 ;
        /*00a0*/               @P1 BRA 0x10 ;
        /*00b0*/                   STG.E.128 desc[UR12][R4.64], R12 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""
PTX = """
$L__BB0_2:
    { cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2; }
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
    ld.global.b16 %rs1, [ %rd3 ];
    ld.shared.v2.b32 {%r5, %r6}, [%r7];
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r9];
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
    bar.sync 0;
    @%p2 bra $L__BB0_2;
    ret;
"""
AMD = """
.LBB0_2:                                ; =>This Inner Loop Header
\tglobal_load_dwordx4 v[4:7], v[0:1], off
\tbuffer_load_ushort v1, v2, s[0:3], 0 offen
\tds_read_b128 v[8:11], v3
\tds_read2_b32 v[8:9], v3 offset1:8
\tds_read_u8 v3, v4
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\ts_barrier
\ts_cbranch_scc1 .LBB0_2
; %bb.3:
\ts_endpgm
"""
TTGIR = """
  tt.func public @attend(%p: !tt.ptr<bf16>) {
    %q = tt.load %a, %m : tensor<16x64x!tt.ptr<bf16>, #blocked> loc(#loc1)
    scf.for %i = %c0 to %c9 step %c1 iter_args(%x = %y) -> (i32)  : i32 {
      %n = tt.load %numbers : !tt.ptr<i64> loc(#loc2)
      %r:2 = scf.for %t = %c0 to %c4 step %c1 iter_args(%z = %y) -> (i32)  : i32 {
        %k = ttg.async_copy_global_to_local %b, %c : tensor<64x64x!tt.ptr<i8>, #b> -> <64x64xi8>
        %s = tt.dot %q, %k, %z : tensor<16x64xbf16, #d> * tensor<64x32xbf16> -> tensor<16x32xf32>
        scf.yield %s : tensor<16x64xf32>
      } loc(#loc3)
      scf.yield %x : tensor<16x64xf32>
    } loc(#loc4)
    %w:2 = scf.while (%g = %h) : (i32) -> i32 {
      scf.condition(%ok) %g : i32
    } do {
    ^bb0(%g: i32):
      %e = ttng.warp_group_dot %u : !ttg.memdesc<64x16xbf16> * !ttg.memdesc<16x128xbf16> -> i32
      tt.store %o, %e, %m : tensor<64x128x!tt.ptr<f32>, #blocked>
      scf.yield %g : i32
    } loc(#loc5)
    tt.return
"""


def loop_of(text, dialect):
    (loop,) = listing.innermost(listing.read(text, dialect), dialect)
    return loop


def test_the_innermost_loop_of_each_dialect():
    """The outer loop from 0x10, and the branch to itself that fills the end up, are not it."""
    loop = listing.count(loop_of(SASS, "sass"))
    assert loop.instructions == 8
    assert (loop.barriers, loop.matrix) == (1, "mma.sync")
    assert loop.global_widths == {64: 1, 16: 1}
    assert loop.shared_widths == {8: 1, 128: 1}
    assert loop.spills == 0
    loop = listing.count(loop_of(PTX, "ptx"))
    assert (loop.instructions, loop.barriers, loop.matrix) == (9, 1, "wgmma")
    assert loop.global_widths == {128: 2, 32: 1, 16: 1}
    assert loop.shared_widths == {64: 1, 128: 1}
    loop = listing.count(loop_of(AMD, "amdgcn"))
    assert (loop.instructions, loop.barriers, loop.matrix) == (8, 1, "mfma")
    assert loop.global_widths == {128: 1, 16: 1}
    assert loop.shared_widths == {128: 1, 64: 1, 8: 1}


def test_spilled_registers_are_counted_where_they_are_touched():
    sass = [
        "/*0000*/ STL [R1], R4 ;",
        "/*0010*/ LDL.LU R5, [R1] ;",
        "/*0020*/ LDS R6, [R7] ;",
        "/*0030*/ LDGSTS.E.64 [R29], desc[UR12][R4.64] ;",
        "/*0040*/ @P0 BRA 0x10 ;",
    ]
    assert listing.count(loop_of("\n".join(sass), "sass")).spills == 1
    amd = ".LBB0_2:\n\tscratch_load_dword v1, off, s3\n\ts_cbranch_scc1 .LBB0_2\n"
    assert listing.count(loop_of(amd, "amdgcn")).spills == 1


def test_a_kernel_without_a_loop_is_all_of_it():
    straight = "/*0000*/ LDG.E.128 R4, [R2.64] ;\n/*0010*/ EXIT ;\n/*0020*/ BRA 0x20 ;"
    assert [each.name for each in loop_of(straight, "sass")] == ["LDG.E.128", "EXIT", "BRA"]


def test_work_is_of_the_innermost_loops():
    inner, turning = work.innermost(TTGIR)
    assert inner == work.Work(bytes=64 * 64, flops=2 * 16 * 64 * 32, ahead=True)
    assert turning == work.Work(bytes=64 * 128 * 4, flops=2 * 64 * 16 * 128, ahead=False)
    (whole,) = work.innermost("%q = tt.load %a : tensor<16x64x!tt.ptr<bf16>, #b>\n tt.return")
    assert whole == work.Work(bytes=2048, flops=0, ahead=False)


def lines(*each: str) -> list[Instruction]:
    return [Instruction(*line.split(" ", 1)) for line in each]


def test_every_pipe_by_hand():
    loop = lines(
        "FADD R1, R2, R3", "LOP3.LUT R4, R1, R2, R3", "MUFU.EX2 R5, R4", "LDS.128 R8, [R5]"
    )
    found = hopper.predict(loop, work.Work(2070, 0, False), warps=4, blocks=2)
    clocks = found.clocks
    assert (clocks["issue"], clocks["fma"], clocks["alu"]) == (8, 2, 4)
    assert (clocks["mufu"], clocks["lsu"], clocks["tensor"]) == (16, 32, 0)
    assert clocks["memory"] == pytest.approx(2 * 2070 / 20.72, rel=1e-3)
    # FADD's result after 4 clocks, LOP3's after 5, MUFU's after 20, and the clocks of issue
    assert clocks["latency"] == 4 + 4 + 5 + 20
    assert (found.limit, found.bound_by, found.fraction) == ("memory", "memory", 1.0)


def test_one_warp_waits_for_what_it_reads():
    alone = lines("LDG.E R4, [R2.64]", "FADD R9, R8, R8")
    waits = lines("LDG.E R4, [R2.64]", "FADD R9, R4, R8")
    assert hopper.latency(alone) == 2
    assert hopper.latency(waits) == 1 + hopper.TRIP + 1
    wide = lines("LDS.64 R4, [R2]", "FADD R9, R5, R8")  # the second register of the pair
    assert hopper.latency(wide) == 1 + 28 + 1
    assert hopper.latency(lines("STS [R4], R5", "FADD R9, R4, R8")) == 2


def test_products_take_the_matrix_unit_at_its_own_rate():
    wide, small = lines("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "HMMA.16816.F32 R4, R8")
    clocks, alone = hopper.products(wide)
    assert clocks == pytest.approx(2 * 64 * 128 * 16 / 4 / hopper.TENSOR)
    assert alone
    clocks, alone = hopper.products(small)
    assert clocks == pytest.approx(2 * 16 * 8 * 16 / (0.62 * hopper.TENSOR))
    assert not alone
    fp8 = lines("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24")
    assert hopper.products(fp8[0])[0] == hopper.products(wide)[0]  # twice as many at twice the rate


def test_what_other_blocks_read_again_is_no_memorys_limit():
    loop = lines("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24")
    flops = 4 * 2 * 64 * 128 * 16
    reread = hopper.predict(loop, work.Work(flops // 128, flops, True), warps=8, blocks=1)
    assert reread.limit == "tensor"
    assert "flight" not in reread.clocks
    streamed = hopper.predict(loop, work.Work(flops // 64, flops, True), warps=8, blocks=1)
    assert (streamed.limit, streamed.bound_by) == ("memory", "memory")
    few = hopper.predict(loop, work.Work(2072, 0, True), warps=8, blocks=1)
    assert few.bound_by == "flight"  # too little is asked for ahead of time
    assert few.fraction == pytest.approx(2072 / hopper.MEMORY / (hopper.TRIP / 2))


def test_nothing_is_predicted_of_what_does_not_run():
    loop = lines("FADD R1, R2, R3")
    assert hopper.predict(loop, work.Work(0, 0, False), warps=4, blocks=2) is None
    assert hopper.predict(loop, work.Work(64, 0, False), warps=4, blocks=0) is None


def test_what_cannot_be_known_says_so(monkeypatch):
    """Without a disassembler the PTX is read and said to be; what does not compile has no loops;
    two loops that became one are not given the work of either."""
    asm = {"cubin": b"", "ptx": PTX, "ttgir": "%q = tt.load %a : tensor<512x!tt.ptr<bf16>, #b>"}
    compiled = SimpleNamespace(asm=asm)
    fits = report.aot.Result("copy", "small", "sm_90", 32, 0, 0, 8)
    monkeypatch.setattr(report.aot, "check", lambda *_: fits)
    monkeypatch.setattr(report.aot, "build", lambda *_: compiled)
    monkeypatch.setattr(report.aot, "cuobjdump", lambda *_: None)
    each = dict(name="small", num_warps=4)
    found = report.report(each, "sm_90", "copy")
    assert found.source == "ptx"
    assert found.main.bytes == 1024
    assert found.main.fraction is None
    assert "no prediction" in found.unknown
    monkeypatch.setattr(report.aot, "cuobjdump", lambda *_: SASS)
    assert report.report(each, "sm_90").main.fraction is not None
    assert report.report(each | dict(loop=-1), "sm_90").to_dict()["main"]["bytes"] == 1024
    asm["ttgir"] = TTGIR
    found = report.report(each, "sm_90")
    assert found.unknown == "the compiler made 1 inner loops of 2"
    assert found.main.bytes is None
    broken = report.aot.Result("copy", "small", "sm_90", problem="does not compile: why")
    monkeypatch.setattr(report.aot, "check", lambda *_: broken)
    found = report.report(each, "sm_90")
    assert (found.unknown, found.main) == ("does not compile: why", None)
    assert found.to_dict()["problem"] == "does not compile: why"
    assert found.to_dict()["loops"] == []
