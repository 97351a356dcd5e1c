"""What is read from a disassembly, what of it is refused, and what is predicted from it."""

from dataclasses import replace

import pytest

from benchmarks.kernels.machine_code import (
    TENSOR_CORE,
    WIDE_ASYNC_LOAD,
    Instruction,
    Loop,
    parse,
)
from benchmarks.kernels.machine_code_report import Row, over_budget
from benchmarks.kernels.prediction import GPUS, LoopCost, programs_per_sm

RESOURCES = "Function kernel: REG:115 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:640"
LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00ff */
                                                                                   /* 0x0000 */
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;     /* 0x00ff */
        /*0020*/                   DEPBAR.LE SB0, 0x0 ;                            /* 0x00ff */
        /*0030*/              @!P0 BRA 0x30 ;                                      /* 0x00ff */
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;                            /* 0x00ff */
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                 /* 0x00ff */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;       /* 0x00ff */
        /*0070*/              @P1  LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R3], [R4] ;  /* 0x00ff */
        /*0080*/                   LDGSTS.E.LTC128B [R3], [R4.64] ;                /* 0x00ff */
        /*0090*/                   MUFU.EX2 R5, R6 ;                               /* 0x00ff */
        /*00a0*/             @UP0  BRA 0x40 ;                                      /* 0x00ff */
        /*00b0*/                   STL.64 [R1], R8 ;                               /* 0x00ff */
        /*00c0*/                   EXIT ;                                          /* 0x00ff */
"""


def test_the_loop_over_tiles():
    code = parse(LISTING.splitlines(), RESOURCES)
    assert (code.registers, code.spilled, code.local_accesses) == (115, 24, 1)
    assert len(code.instructions) == 13
    loop = code.loop_of(TENSOR_CORE)
    assert [instruction.address for instruction in loop.instructions] == [*range(0x40, 0xB0, 16)]
    assert loop.tensor_cores == {"HGMMA"}
    # The line size of the L2 cache in a load's name is not its width.
    assert loop.count(WIDE_ASYNC_LOAD) == 1
    assert loop.exponentials == 1
    # Neither the wait in front of the loop nor that for the tensor cores.
    assert loop.tiles_in_flight == 1


def test_no_loop_without_tensor_cores():
    assert (
        parse(LISTING.replace("HGMMA", "FFMA").splitlines(), RESOURCES).loop_of(TENSOR_CORE) is None
    )


ROW = Row("row_statistics", "D=128", "sm_90", 8, 115, 114688, 0, 2, "HGMMA", 4, 1, 690)


def test_a_longer_loop_fails():
    assert not list(over_budget([ROW], {ROW.key: 690}))
    (reason,) = over_budget([replace(ROW, issued=691)], {ROW.key: 690})
    assert reason.endswith("691 instructions per K tile, 690 recorded")
    (reason,) = over_budget([ROW], {})
    assert "--record" in reason
    assert not list(over_budget([replace(ROW, issued=None)], {}))


@pytest.mark.parametrize(
    ("registers", "shared", "expected"),
    [(128, 114688, 2), (129, 114688, 1), (128, 116000, 1), (32, 0, 8)],
)
def test_programs_that_share_an_sm(registers, shared, expected):
    assert programs_per_sm(registers, shared, num_warps=8, gpu=GPUS[90]) == expected


def loop(num_issued: int, num_exponentials: int, in_flight: int) -> Loop:
    """A loop of so many instructions."""
    names = ["MUFU.EX2"] * num_exponentials + ["FADD"] * (num_issued - num_exponentials - 1)
    instructions = [Instruction(0, name, "") for name in names]
    return Loop((*instructions, Instruction(0, "DEPBAR.LE", f"SB0, {hex(in_flight)}")))


COST = LoopCost(264, 64, 2 * 256 * 64 * 128, 1.0, num_warps=8, programs_per_sm=2)


def test_the_slowest_of_issue_exponentials_and_products():
    gpu = GPUS[90]
    # 8 warps, 4 schedulers, 2 programs: 4 cycles for each instruction.
    assert COST.microseconds(loop(1000, 64, 1), gpu) == pytest.approx(64 * 4000 / gpu.clock * 1e6)
    # 32 exponentials of a warp take two cycles.
    expected = 64 * 2 * 8 * 300 * 2 / gpu.clock * 1e6
    assert COST.microseconds(loop(400, 300, 1), gpu) == pytest.approx(expected)
    products = 64 * 2 * COST.operations / gpu.operations_per_cycle / gpu.clock * 1e6
    assert COST.microseconds(loop(10, 1, 1), gpu) == pytest.approx(products)


def test_a_wait_for_what_was_just_asked_for_costs_its_latency():
    alone = replace(COST, programs_per_sm=1, num_programs=132)
    prefetched, waiting = (alone.microseconds(loop(690, 68, n), GPUS[90]) for n in (1, 0))
    assert waiting > 1.3 * prefetched


def test_bytes_bound_a_launch():
    bound = replace(COST, num_bytes=4.8e12)
    assert bound.microseconds(loop(10, 1, 1), GPUS[90]) == pytest.approx(1e6)
