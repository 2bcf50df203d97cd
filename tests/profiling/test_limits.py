"""Instructions, occupancy and rooflines against figures worked out by hand."""

import pytest
import torch

from kernels import catalogue
from kernels.device import TARGETS
from profiling.instructions import hopper_loops, overlapped, sass_mix
from profiling.limits import PEAKS, PROCESSORS, occupancy, roofline
from profiling.resources import Use, rooflines


def test_instructions_of_a_listing_counted_by_hand():
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   LDSM.16.M88.4 R8, [R20] ;
        /*0050*/              @UP0 HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0060*/                   FFMA.FTZ R3, R4, R5, R6 ;
        /*0070*/                   FADD R3, R4, R5 ;
        /*0080*/                   MUFU.EX2 R3, R3 ;
        /*0090*/                   MUFU.RCP R3, R3 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P0 STG.E.64 desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   NOP ;
    """
    mix = {kind: count for kind, count in sass_mix(listing).items() if count}
    assert mix == {
        "total": 12, "tensor_core": 1, "ffma": 1, "fp32": 2, "ldg": 2, "stg": 1, "lds": 1, "barriers": 1, "mufu": 2,
        "ex2": 1,
    }  # fmt: skip


def test_the_order_of_a_loop_read_by_hand():
    """The inner of two loops, with a branch forwards and a loop without products beside it."""
    listing = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], !UPT ;
    .L_x_0:
        /*0010*/                   MUFU.EX2 R1, R1 ;
    .L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/              @!P2 BRA `(.L_x_2) ;
        /*0050*/                   MUFU.EX2 R1, R1 ;
    .L_x_2:
        /*0060*/                   MUFU.EX2 R2, R2 ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   MUFU.EX2 R3, R3 ;
        /*00a0*/               @P0 BRA `(.L_x_1) ;
        /*00b0*/               @P1 BRA `(.L_x_0) ;
    .L_x_3:
        /*00c0*/                   MUFU.EX2 R3, R3 ;
        /*00d0*/               @P0 BRA `(.L_x_3) ;
    """
    assert hopper_loops(listing) == [("H1 W0 E2 H2 E1", 9)]
    assert overlapped("H1 W0 E2 H2 E1") == (1, 3)
    assert overlapped("H8 W0 H2 E13 H1 E13 H1 E8 W0") == (34, 34)
    assert overlapped("E5 H8 W0 E32 H4") == (5, 37)  # what the turn before left in flight
    assert overlapped("H4 W1 E4 W0") == (4, 4)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks", "limited_by"),
    [
        ("sm_90", 32, 0, 4, 16, ["warps", "registers"]),  # 65536 / (32 x 128)
        ("sm_90", 128, 0, 8, 2, ["registers"]),  # 65536 / (128 x 256)
        ("sm_90", 129, 0, 8, 1, ["registers"]),  # rounded up to 136
        ("sm_90", 32, 113 * 1024, 4, 2, ["shared memory"]),  # and 1 KB more each of 228
        ("sm_90", 32, 114 * 1024, 4, 1, ["shared memory"]),
        ("sm_90", 16, 0, 1, 32, ["blocks"]),
        ("sm_89", 32, 0, 8, 6, ["warps"]),
        ("sm_86", 16, 0, 1, 16, ["blocks"]),
        ("sm_120", 32, 99 * 1024, 4, 1, ["shared memory"]),
        ("gfx942", 128, 0, 4, 4, ["registers"]),  # 512 / 128 waves in each of four parts
        ("gfx942", 32, 40 * 1024, 4, 1, ["shared memory"]),
    ],
)
def test_occupancy_by_hand(arch, registers, shared, warps, blocks, limited_by):
    found = occupancy(arch, registers, shared, warps)
    assert found["blocks"] == blocks and found["limited_by"] == limited_by
    assert found["warps"] == blocks * warps and found["share"] == blocks * warps / PROCESSORS[arch].warps


def test_an_unknown_architecture_has_the_limits_of_its_kin():
    assert occupancy("sm_121", 32, 0, 8) == occupancy("sm_89", 32, 0, 8)
    assert roofline("sm_103", "bfloat16", 1, 1, True) == roofline("sm_100", "bfloat16", 1, 1, True)


def test_tensor_memory_limits_occupancy_too():
    assert occupancy("sm_100", 64, 0, 4, 256)["blocks"] == 2 and occupancy("sm_100", 64, 0, 4, 256)["limited_by"]


def test_rooflines_by_hand():
    """1e12 operations at 989.4e12 a second against 1e9 bytes at 3350e9 a second."""
    assert roofline("sm_90", "bfloat16", 10**12, 10**9, True)["us"] == pytest.approx(1e6 / 989.4)
    moving = roofline("sm_90", "bfloat16", 10**9, 10**9, False)
    assert moving["us"] == pytest.approx(1e6 / 3350) and moving["bound"] == "bytes" and moving["intensity"] == 1.0
    assert set(PEAKS) == set(PROCESSORS) == set(TARGETS)


def test_every_op_has_a_roofline_of_both_passes():
    """From the op's own cost: its bytes, and its operations on tensor cores where its kernels use them."""
    common = {"tile": {}, "num_warps": 4, "num_stages": 1, "dtype": "bfloat16", "arch": "sm_90"}
    table = [
        Use(op=op.name, kernel="k", cases=[op.sizes[0].name], tensor_core={"wgmma": 1} if index else {}, **common)
        for index, op in enumerate(catalogue.OPS)
    ]
    rows = {(row["op"], row["pass"]): row for row in rooflines(catalogue.OPS, table)}
    for index, op in enumerate(catalogue.OPS):
        inputs = op.inputs(op.sizes[0], torch.bfloat16, "meta")
        for direction, cost in zip(("forward", "backward"), op.cost(inputs, op.sizes[0].options), strict=True):
            row = rows.pop((op.name, direction), None)
            assert (row is None) == (cost is None)
            if cost:
                assert (row["flops"], row["bytes"]) == cost
                rate = 989.4 if index else 66.9
                assert row["us"] == pytest.approx(max(cost.flops / rate / 1e6, cost.bytes / 3350 / 1e3))
    assert not rows
