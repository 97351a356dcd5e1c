"""Predicts how long the launches of one eviction take, from their machine code.

An SM issues one instruction per cycle from each of its four schedulers, 16 exponentials per cycle,
and multiplies at the rate of the data sheet. A warp's round through a loop over K tiles keeps the
SM busy for the **sum** of the three: they do not overlap, and neither do the programs that share an
SM. So a launch takes what the SM with most programs takes for them, one after the other. A tile
that is asked for ``w`` rounds ahead has w + 1 rounds to arrive, while the P programs that an SM
holds at once take turns. So a round of one program takes::

    max(busy, (busy + LATENCY) / (w + 1) / P)        cycles

Values are asked for at the start of the round that uses them at its end, and a round is longer than
LATENCY. A launch takes at least its bytes at the data sheet's bandwidth times BANDWIDTH_SHARE.

``select_and_move`` and ``window_whitening`` are one program for each head, which runs several loops
one after the other (``selection_parts.py``, ``whitening_parts.py``) without tensor cores. A round
issues its instructions, a warp one per cycle at most, and waits for loads that depend on one
another, LATENCY each, and at barriers, BARRIER each. While one program waits, others of the SM
issue::

    max(P * busy, busy + loads * LATENCY + barriers * BARRIER)        cycles

P is the number of programs on the SM that has most of them: of 288 heads on the 132 SMs of an H200
some SMs have three, and the others, which have two, wait for them. ``window_whitening`` runs beside
``row_statistics``, which takes longer: its waits are filled by the other, and it takes what it
issues, spread over all SMs.

Compared with one GPU, an H200 on 2026-11-26, where Triton 3.6 compiled the kernels: microseconds
for one sequence of Qwen3-8B at budget 4096, predicted from the machine code of Triton 3.9::

                              predicted  measured
    vase      row_statistics        257       215    20 % too long
              candidate_scores      268       280     4 % too short
              select_and_move        45        45
              in all                570       541     5 % too long
    distinct  row_statistics        257       214    20 % too long; as its kernels were then:
              candidate_scores      283       308     8 % too short
              value_distinctness    112       122     9 % too short
              select_and_move        37        36

With 1 to 8 splits of a head in place of 4, and with two sequences, the scoring's prediction is as
far off: ``row_statistics`` 14 to 32 % too long, ``candidate_scores`` between 12 % too short and 8 %
too long. The sum, BARRIER and BANDWIDTH_SHARE were chosen after these measurements: the largest of
the three in place of their sum gave half of what was measured. No other GPU's prediction has been
compared with anything.

``window_whitening`` has not been timed, alone or beside others: alone it would take 86 us by this,
of which half are BARRIERs, which were chosen for programs of four warps, and it has one.

What is not counted: starting programs, bank conflicts, the barriers of the scoring, and the values
that ``candidate_scores`` reads beside its keys but for their instructions.
"""

from dataclasses import dataclass

from benchmarks.kernels.machine_code import Loop
from vase_vllm.layout.arithmetic import cdiv

LATENCY = 700
"""Cycles from asking for data in memory to having them: an assumption."""
BARRIER = 400
"""Cycles from one barrier of ``select_and_move`` to the next beyond those that it issues.

Chosen so that both of its times on an H200 come out: that of ``vase`` and that of ``distinct``.
"""
BANDWIDTH_SHARE = 0.65
"""Of the data sheet's bandwidth, what reading K of one sequence and nothing else reached.

302 MB in 94 to 101 us on an H200, 3.0 to 3.2 TB/s of 4.8; of two sequences it was 3.6 TB/s.
"""
NUM_SCHEDULERS = 4
EXPONENTIALS_PER_CYCLE = 16
WARP_SIZE = 32
REGISTERS = 65536
RESERVED_SHARED = 1024
"""Bytes of shared memory that the driver takes for each program."""


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU.

    Attributes:
        num_sms: streaming multiprocessors.
        clock: cycles per second at which ``peak`` is stated.
        bandwidth: of the memory, bytes per second.
        peak: dense bf16 operations per second that accumulate in fp32.
        shared_memory: bytes of an SM.
        max_threads: of an SM.
    """

    name: str
    num_sms: int
    clock: float
    bandwidth: float
    peak: float
    shared_memory: int
    max_threads: int

    @property
    def operations_per_cycle(self) -> float:
        """Of one SM."""
        return self.peak / self.num_sms / self.clock

    @property
    def reached_bandwidth(self) -> float:
        """Bytes per second that a kernel is taken to read."""
        return BANDWIDTH_SHARE * self.bandwidth


GPUS = {
    80: Gpu("A100 80GB", 108, 1.41e9, 2.039e12, 312e12, 164 * 1024, 2048),
    90: Gpu("H200", 132, 1.83e9, 4.8e12, 989e12, 228 * 1024, 2048),
    100: Gpu("B200", 148, 1.85e9, 8.0e12, 2250e12, 228 * 1024, 2048),
    120: Gpu("RTX 5090", 170, 2.41e9, 1.79e12, 209e12, 100 * 1024, 1536),
}


def programs_per_sm(registers: int, shared: int, num_warps: int, gpu: Gpu) -> int:
    """Programs that an SM holds at once."""
    # A warp's registers are given out by 256.
    of_warp = cdiv(registers * WARP_SIZE, 256) * 256
    return min(
        REGISTERS // (of_warp * num_warps),
        gpu.shared_memory // (shared + RESERVED_SHARED),
        gpu.max_threads // (num_warps * WARP_SIZE),
    )


@dataclass(frozen=True)
class LoopCost:
    """A loop over tiles, as one launch runs it.

    Attributes:
        num_programs: of the launch.
        rounds: of each program.
        operations: multiplications and additions of one round of a program.
        num_bytes: that the launch reads from memory in this loop.
        num_warps: of a program.
        programs_per_sm: that run at once.
    """

    num_programs: int
    rounds: int
    operations: float
    num_bytes: float
    num_warps: int
    programs_per_sm: int

    def microseconds(self, loop: Loop, gpu: Gpu) -> float:
        """What the launch takes for this loop."""
        num_issued = len(loop.instructions) * self.num_warps
        exponentials = loop.exponentials * self.num_warps * WARP_SIZE
        busy = (
            num_issued / NUM_SCHEDULERS
            + exponentials / EXPONENTIALS_PER_CYCLE
            + self.operations / gpu.operations_per_cycle
        )
        in_turn = cdiv(self.num_programs, gpu.num_sms)
        together = min(self.programs_per_sm, in_turn)
        in_flight = loop.tiles_in_flight or 0
        period = max(busy, (busy + LATENCY) / (in_flight + 1) / together)
        seconds = in_turn * self.rounds * period / gpu.clock
        return 1e6 * max(seconds, self.num_bytes / gpu.reached_bandwidth)


@dataclass(frozen=True)
class Part:
    """A part of a program that runs its parts one after the other: a loop, or what is in none.

    Attributes:
        name: what it does.
        rounds: how often a program runs it.
        issued: instructions of a warp in a round.
        loads: from memory that a round waits for, one after the other.
        barriers: of a round.
        num_bytes: that the launch reads from and writes to memory in this part.
    """

    name: str
    rounds: int
    issued: int
    loads: int
    barriers: int
    num_bytes: float = 0

    def microseconds(
        self, num_programs: int, num_warps: int, programs_per_sm: int, gpu: Gpu
    ) -> float:
        """What a launch of so many programs takes for it.

        Args:
            num_programs: of the launch.
            num_warps: of a program.
            programs_per_sm: that fit on an SM at once.
        """
        waves = cdiv(num_programs, gpu.num_sms * programs_per_sm)
        together = min(programs_per_sm, cdiv(num_programs, gpu.num_sms))
        busy = self.issued * num_warps / NUM_SCHEDULERS
        # A scheduler of its own is all that a single warp can use.
        alone = max(busy, self.issued)
        waiting = self.loads * LATENCY + self.barriers * BARRIER
        cycles = waves * self.rounds * max(together * busy, alone + waiting)
        return 1e6 * max(cycles / gpu.clock, self.num_bytes / gpu.reached_bandwidth)

    def microseconds_beside(self, num_programs: int, num_warps: int, gpu: Gpu) -> float:
        """What a launch of so many programs takes of another that runs longer beside it."""
        num_issued = num_programs * num_warps * self.rounds * self.issued
        return 1e6 * num_issued / (NUM_SCHEDULERS * gpu.num_sms) / gpu.clock
