"""How an eviction is divided into launches, programs and tiles, by counted costs.

Why candidates are split: one due sequence of Qwen3-8B is 36 * 8 = 288 heads, for which an H200 has
264 program slots (2 per SM): two waves, of which the second is 9 % full. Counted in K tiles and
waves (:func:`choose_splits`), one program per head takes 132 tile times at budget 4096, 4 splits
take 90, and 70 would be perfect. At 64 due sequences one program per head is within 4 % of perfect,
and is what is chosen.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from vase_vllm.kernels.scoring import MAX_SPLITS
from vase_vllm.layout.arithmetic import cdiv

HEAD_SIZES = (64, 96, 128, 192, 256)
KEY_TILE = 64
SPLIT_OVERHEAD = 2
"""Cost of starting a program and loading its queries, in K tiles of work: an estimate."""


@dataclass(frozen=True)
class DeviceLimits:
    """What a launch must fit into.

    Attributes:
        num_sms: streaming multiprocessors.
        shared_memory: bytes that one program may use.
        capability: major number of the compute capability.
    """

    num_sms: int
    shared_memory: int
    capability: int


INTERPRETER_LIMITS = DeviceLimits(num_sms=1, shared_memory=227 * 1024, capability=9)


@dataclass(frozen=True)
class ScoringTile:
    """Tile of the two scoring launches.

    Attributes:
        queries: query rows of a program; they stay in shared memory.
        keys: candidates per step.
        num_warps: warps of a program.
        num_stages: of the software pipeline; with 3 two K tiles are loaded while one is multiplied.
        programs_per_sm: programs that share an SM.
        max_registers: bound on a thread's registers; None leaves them to the compiler.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """How tasks (due sequence, layer, KV head) are divided into launches.

    Attributes:
        tasks_per_launch: most tasks of one launch.
        capacity: candidates that a task's row of scratch memory holds.
        scratch_bytes: scratch memory of one launch.
    """

    tasks_per_launch: int
    capacity: int
    scratch_bytes: int


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs, and its arguments by name."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]

    def run(self) -> None:
        """Launch the kernel on torch's current device."""
        self.kernel[(self.num_programs,)](**self.arguments)


def run_launches(launches: Iterable[Launch], device: torch.device) -> None:
    """Run launches in order on a device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.run()


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of a CUDA device; on any other, under the interpreter, ``INTERPRETER_LIMITS``."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.major,
    )


@lru_cache
def scoring_tile(
    num_rows: int, head_size: int, element_size: int, limits: DeviceLimits
) -> ScoringTile:
    """The largest query tile that fits, for K is read once per query tile.

    Hopper and Blackwell GPUs of the data centre multiply straight from shared memory; on others
    the queries take registers, and half as many rows fit. Registers are bounded so that a second
    program shares the SM wherever this causes no spills, which ``make compile-check`` verifies. An
    explicit bound also stops ptxas from spilling a few bytes for an occupancy of its own choice.

    Args:
        num_rows: query rows of a KV head, G * W.
        head_size: D.
        element_size: bytes of an element of the cache.
        limits: of the device.
    """
    largest = 256 if limits.shared_memory >= 200 * 1024 else 128
    queries = min(largest, max(16, triton.next_power_of_2(num_rows)))
    if element_size == 4:
        # fp32 products run on the FMA units, whose operands are registers.
        return ScoringTile(min(queries, 32), 32, 4 if head_size <= 128 else 8, 2, 1)
    # A product that runs on its own keeps its K tile until it is done, beside the two in flight.
    num_tiles = 3 if limits.capability in (9, 10) else 2
    vector = triton.next_power_of_2(head_size) * element_size
    while True:
        needed = (queries + num_tiles * KEY_TILE) * vector + 1024
        if needed <= limits.shared_memory or queries == 16:
            num_warps = 8 if queries >= 128 else 4
            paired = 2 * needed <= limits.shared_memory and limits.capability != 10
            # Blackwell's products keep their sums out of the registers: ptxas chooses well there.
            alone = None if limits.capability == 10 and num_warps == 8 else 255
            max_registers = 128 if paired and num_warps == 8 else alone
            return ScoringTile(queries, KEY_TILE, num_warps, 3, 1 + paired, max_registers)
        queries //= 2


def choose_splits(num_tasks: int, num_tiles: int, num_slots: int) -> int:
    """The number of splits of the candidates that takes the least time.

    A program takes as long as its K tiles and its start, and ``num_slots`` programs run at once:

    s splits take ``ceil(tasks * s / slots) * (ceil(tiles / s) + overhead)``. The fewest win a tie.

    One due sequence of Qwen3-8B at budget 4096 on an H200, and 64 of them:

    >>> choose_splits(num_tasks=36 * 8, num_tiles=64, num_slots=2 * 132)
    4
    >>> choose_splits(num_tasks=64 * 36 * 8, num_tiles=64, num_slots=2 * 132)
    1

    Args:
        num_tasks: heads of a launch.
        num_tiles: K tiles of the head that has most.
        num_slots: programs that run at once.
    """

    def cost(splits: int) -> int:
        waves = cdiv(num_tasks * splits, num_slots)
        return waves * (cdiv(num_tiles, splits) + SPLIT_OVERHEAD)

    return min(range(1, min(MAX_SPLITS, num_tiles) + 1), key=cost)


def plan_launch(
    num_tasks: int, max_candidates: int, num_rows: int, scratch_bytes: int
) -> LaunchPlan:
    """Divide an eviction into launches whose scratch memory fits.

    The scratch memory of a head is 8 bytes per candidate, and 8 per query row and split. 64 MiB are
    room for 1024 heads of 4096 candidates and 256 query rows:

    >>> plan_launch(64 * 36 * 8, 4096, 256, scratch_bytes=64 * 2**20)
    LaunchPlan(tasks_per_launch=1024, capacity=4096, scratch_bytes=67108864)

    Args:
        num_tasks: due sequences * layers * KV heads.
        max_candidates: candidates of the head that has most.
        num_rows: query rows of a KV head, G * W; 0 if no attention is scored.
        scratch_bytes: bound on the scratch memory.

    Raises:
        ValueError: if the scratch of a single head does not fit.
    """
    # A multiple of 16, so that every part of the scratch memory is aligned to 16 bytes.
    capacity = cdiv(max_candidates, 16) * 16
    per_task = 8 * (capacity + MAX_SPLITS * num_rows)
    tasks_per_launch = min(num_tasks, scratch_bytes // per_task)
    if tasks_per_launch == 0:
        raise ValueError(
            f"scratch of {scratch_bytes} bytes is too small for {max_candidates} candidates: "
            f"{per_task} are needed"
        )
    num_launches = cdiv(num_tasks, tasks_per_launch)
    tasks_per_launch = cdiv(num_tasks, num_launches)
    return LaunchPlan(tasks_per_launch, capacity, tasks_per_launch * per_task)


def plan_splits(plan: LaunchPlan, tile: ScoringTile, limits: DeviceLimits) -> int:
    """The best number of programs per task of a plan, by :func:`choose_splits`."""
    num_slots = limits.num_sms * tile.programs_per_sm
    return choose_splits(plan.tasks_per_launch, cdiv(plan.capacity, tile.keys), num_slots)
