"""Predicts how long the scoring launches of one eviction take, from their machine code.

An SM issues one instruction per cycle from each of its four schedulers, 16 exponentials per cycle,
and multiplies at the rate of the data sheet. A warp's round through a loop, which is one K tile,
keeps it busy for the largest of the three; P programs on an SM share it. A tile that is asked for
``w`` rounds ahead has w + 1 rounds to arrive. So a round of all P programs takes::

    max(P * busy, (busy + LATENCY) / (w + 1))        cycles

Values are asked for at the start of the round that uses them at its end, and a round is longer than
LATENCY. A launch takes its waves of programs, or its bytes at the bandwidth of the data sheet if
that is longer. What is not counted: starting programs, barriers, bank conflicts, the selection and
the moves, and that no GPU reaches its data sheet. So this is a lower bound, good for comparing two
versions of one kernel. Nothing of it has been compared with a GPU.
"""

from dataclasses import dataclass

from benchmarks.kernels.machine_code import Loop
from vase_vllm.layout.arithmetic import cdiv

LATENCY = 700
"""Cycles from asking for data in memory to having them: an assumption."""
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
        busy = max(
            num_issued / NUM_SCHEDULERS,
            exponentials / EXPONENTIALS_PER_CYCLE,
            self.operations / gpu.operations_per_cycle,
        )
        in_flight = loop.tiles_in_flight or 0
        period = max(self.programs_per_sm * busy, (busy + LATENCY) / (in_flight + 1))
        waves = cdiv(self.num_programs, gpu.num_sms * self.programs_per_sm)
        return 1e6 * max(waves * self.rounds * period / gpu.clock, self.num_bytes / gpu.bandwidth)
