"""What is read from a disassembly, what of it is refused, and what is predicted from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.kernels.machine_code import (
    TENSOR_CORE,
    WIDE_ASYNC_LOAD,
    Instruction,
    Loop,
    MachineCode,
    parse,
)
from benchmarks.kernels.machine_code_report import Row, over_budget
from benchmarks.kernels.prediction import BARRIER, GPUS, LATENCY, LoopCost, Part, programs_per_sm
from benchmarks.kernels.selection_parts import PRIORITY_BITS, PROTECTED_BITS, selection_parts
from benchmarks.kernels.whitening_parts import whitening_parts

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
    assert reason.endswith("691 instructions issued, 690 recorded")
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


def test_issue_exponentials_and_products_add_up():
    gpu = GPUS[90]
    # 8 warps, 4 schedulers, 2 programs: 4 cycles for each instruction.
    issue = 64 * 4 * 400
    # 32 exponentials of a warp take two cycles.
    exponentials = 64 * 2 * 8 * 300 * 2
    products = 64 * 2 * COST.operations / gpu.operations_per_cycle
    expected = (issue + exponentials + products) / gpu.clock * 1e6
    assert COST.microseconds(loop(400, 300, 1), gpu) == pytest.approx(expected)


def test_the_sm_with_most_programs_is_waited_for():
    gpu, body = GPUS[90], loop(400, 64, 1)
    two, three = (replace(COST, num_programs=n).microseconds(body, gpu) for n in (264, 265))
    # The third runs alone, and no longer than one of two that share the SM.
    assert three == pytest.approx(1.5 * two)


def test_a_wait_for_what_was_just_asked_for_costs_its_latency():
    alone = replace(COST, programs_per_sm=1, num_programs=132, operations=0)
    busy = 8 * 690 / 4
    prefetched, waiting = (alone.microseconds(loop(690, 0, n), GPUS[90]) for n in (1, 0))
    assert prefetched == pytest.approx(64 * busy / GPUS[90].clock * 1e6)
    assert waiting == pytest.approx(64 * (busy + LATENCY) / GPUS[90].clock * 1e6)
    # Another program on the SM fills the wait.
    shared = replace(alone, programs_per_sm=2, num_programs=264)
    assert shared.microseconds(loop(690, 0, 0), GPUS[90]) == pytest.approx(2 * prefetched)


def test_bytes_bound_a_launch():
    bound = replace(COST, num_bytes=GPUS[90].reached_bandwidth)
    assert bound.microseconds(loop(10, 1, 1), GPUS[90]) == pytest.approx(1e6)


def test_the_parts_of_a_program_wait_for_loads_and_barriers_or_for_other_programs():
    gpu = GPUS[90]
    part = Part("", rounds=10, issued=1000, loads=1, barriers=2)
    # 300 heads on 132 SMs: three programs on some, of which each issues for all of four warps.
    together = part.microseconds(300, num_warps=4, programs_per_sm=4, gpu=gpu)
    assert together == pytest.approx(10 * 3 * 1000 / gpu.clock * 1e6)
    alone = part.microseconds(132, num_warps=4, programs_per_sm=4, gpu=gpu)
    assert alone == pytest.approx(10 * (1000 + LATENCY + 2 * BARRIER) / gpu.clock * 1e6)
    one_warp = part.microseconds(300, num_warps=1, programs_per_sm=4, gpu=gpu)
    assert one_warp == pytest.approx(alone), "three of four schedulers have nothing to issue"
    in_waves = part.microseconds(300, num_warps=4, programs_per_sm=1, gpu=gpu)
    assert in_waves == pytest.approx(3 * alone)
    moving = replace(part, num_bytes=gpu.reached_bandwidth)
    assert moving.microseconds(300, 4, 4, gpu) == pytest.approx(1e6)


def test_a_launch_beside_another_takes_what_it_issues():
    gpu = GPUS[90]
    part = Part("", rounds=10, issued=1000, loads=1, barriers=2)
    # On all SMs alike, however many programs that is for each; its waits are the other's time.
    beside = part.microseconds_beside(288, num_warps=1, gpu=gpu)
    assert beside == pytest.approx(10 * 1000 * 288 / 132 / 4 / gpu.clock * 1e6)
    assert beside < part.microseconds(288, num_warps=1, programs_per_sm=8, gpu=gpu)


def code_of(*names: str, loops: list[tuple[int, int]]) -> MachineCode:
    """Instructions of these names, of which some jump back: to the first from the second."""
    jumps = {end: begin for begin, end in loops}
    instructions = (
        Instruction(16 * i, "BRA" if i in jumps else name, hex(16 * jumps[i]) if i in jumps else "")
        for i, name in enumerate(names)
    )
    return MachineCode(0, 0, tuple(instructions))


SELECTION = [
    *("LDC", "REDUX", "BRA"),  # the protected, in registers
    *("LDG", "BRA", "LDG", "LDG", "BRA", "BRA"),  # from memory: the bits, and a loop in a loop
    *("LDG", "BAR", "BRA"),  # ties
    *("LDG", "STG", "BRA"),  # priorities
    *("REDUX", "BAR", "BRA"),  # the threshold
    *("LDG", "STG", "BRA", "LDG", "STG", "BAR", "BRA", "EXIT"),  # survivors, moves
]
LOOPS = [(1, 2), (3, 4), (6, 7), (5, 8), (9, 11), (12, 14), (15, 17), (18, 20), (21, 24)]
ARGUMENTS = dict(TILE=1024, WINDOW=64, MOVE_TILE=32, HEAD_SIZE=128)


def test_loops_that_are_in_no_other():
    loops = code_of(*SELECTION, loops=LOOPS).outer_loops()
    begins = [loop.instructions[0].address // 16 for loop in loops]
    assert begins == [1, 3, 5, 9, 12, 15, 18, 21]


def test_the_parts_of_the_whitening():
    names = [
        *("LDC", "LDG", "BRA"),  # lengths
        *("LDG", "LDG", "FFMA", "BRA", "BAR", "FFMA", "FFMA", "BRA", "STG", "BRA", "EXIT"),
    ]
    # The values, around the rows before and the own rows of a part.
    code = code_of(*names, loops=[(1, 2), (4, 6), (7, 10), (3, 12)])
    arguments = dict(WINDOW=40, PART=16)
    parts = whitening_parts(code, arguments)
    assert [(part.name, part.rounds, part.issued, part.barriers) for part in parts] == [
        ("once", 1, 2, 1),
        ("lengths", 3, 2, 0),
        ("values", 3, 3, 1),
        ("rows before", 16 + 32, 3, 0),
        ("own rows", 40, 4, 1),
    ]
    with pytest.raises(ValueError, match="3 loops, not 4"):
        whitening_parts(code_of(*names, loops=[(1, 2), (7, 10), (3, 12)]), arguments)


def test_the_parts_of_the_selection():
    code = code_of(*SELECTION, loops=LOOPS)
    parts = selection_parts(code, ARGUMENTS, budget=4096, num_heads=10)
    assert [(part.name, part.rounds, part.issued, part.barriers) for part in parts[1:]] == [
        ("protected", PROTECTED_BITS, 2, 0),
        ("ties", 2, 3, 1),
        ("priorities", 4, 3, 0),
        ("threshold", PRIORITY_BITS, 3, 1),
        ("survivors", 2, 3, 0),
        ("moves", 2, 4, 1),
    ]
    assert parts[0].issued == 2, "the first and the last"
    assert parts[-1].num_bytes == 2 * 10 * 64 * 512
    with pytest.raises(ValueError, match="1 loops that touch no memory"):
        selection_parts(code_of(*SELECTION, loops=LOOPS[1:]), ARGUMENTS, 4096, 10)


def searched_bits(x: np.ndarray, k: int, first: np.ndarray) -> int:
    """Bits that ``kth_largest`` looks at: of positive or negative x; ``first`` come before all."""
    bits = x.astype(np.float32).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | 1 << 31).astype(np.uint32)
    ones, zeros = (np.bitwise_or.reduce(some[~first]) for some in (ordered, ~ordered))
    threshold, differing, num_bits = ones & ~zeros, ones & zeros, 0
    for bit in (np.uint32(1 << shift) for shift in reversed(range(32))):
        if differing & bit:
            num_bits += 1
            count = ((ordered >= threshold | bit) | first).sum()
            if count >= k:
                threshold |= bit
            if count == k:
                break
    return num_bits


def test_the_bits_that_are_searched_of_drawn_heads():
    generator, counted = np.random.default_rng(0), []
    for _ in range(10):
        values = torch.from_numpy(generator.standard_normal((4096, 128))).bfloat16().double()
        value_range = (values.amax(1) - values.amin(1)).numpy()
        protected = np.zeros(4096, dtype=bool)
        protected[np.argsort(-value_range, kind="stable")[:1024]] = True
        weights = np.exp(generator.normal(0, 2, 4096))
        priority = np.log(weights / weights.sum()) + generator.gumbel(size=4096)
        counted.append(
            (
                searched_bits(value_range, 1024, np.arange(4096) < 4),
                searched_bits(priority, 4032, protected),
            )
        )
    means = np.mean(counted, axis=0)
    assert means == pytest.approx([PROTECTED_BITS, PRIORITY_BITS], abs=2)
