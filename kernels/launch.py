"""How an eviction is divided into launches, programs and tiles, by counted costs.

Why candidates are split: one due sequence of Qwen3-8B is 36 * 8 = 288 heads, of which some of an
H200's 132 SMs have three and the others two. Two programs that share an SM take as long as one
after the other, as an H200 showed. So one program per head takes three times its 64 K tiles at
budget 4096, and with its start 198 tile times; 4 splits take 162, and 140 would be perfect
(:func:`plan_launch`). Measured were 675 us for the scoring with one split, and 492 with 4, the best
(benchmarks/results/gpu/); with two due sequences 2 are the best, by count and by time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from vase_vllm.kernels.scoring import MAX_SPLITS
from vase_vllm.kernels.scratch import SCRATCH_BYTES, HeadScratch, padded_words
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
class DistinctnessTile:
    """Tile of the launch that measures the distinctness of the values.

    Attributes:
        rows: of the whitening's basis; they stay in shared memory.
        keys: candidates per step.
        num_warps: warps of a program.
    """

    rows: int
    keys: int
    num_warps: int


@dataclass(frozen=True)
class LaunchPlan:
    """How tasks (due sequence, layer, KV head) are divided into launches and programs.

    Attributes:
        tasks_per_launch: most tasks of one launch.
        num_splits: programs that share a task's candidates.
        capacity: candidates that a task's row of scratch memory holds.
        scratch_bytes: scratch memory of one launch.
    """

    tasks_per_launch: int
    num_splits: int
    capacity: int
    scratch_bytes: int


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs, and its arguments by name.

    Attributes:
        is_beside: whether it may run beside the launches that follow it, up to the first that
            ``needs_beside``: it writes nothing that those in between touch.
        needs_beside: whether it reads what a launch beside has written.
    """

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    is_beside: bool = False
    needs_beside: bool = False

    def run(self) -> None:
        """Launch the kernel on torch's current device."""
        self.kernel[(self.num_programs,)](**self.arguments)


def run_launches(launches: Iterable[Launch], device: torch.device) -> None:
    """Run launches in order on a device; on a GPU those that may run beside others do.

    A later launch of torch's current stream runs after all of them if after each launch beside
    there is one that needs it.
    """
    if device.type != "cuda":
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):
        for launch in launches:
            if launch.is_beside:
                # Not before what came so far: the parts of an eviction share their scratch memory.
                beside = side_stream(device)
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    launch.run()
                continue
            if launch.needs_beside:
                torch.cuda.current_stream().wait_stream(side_stream(device))
            launch.run()


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU's launches beside others.

    Their programs go first: they are few and wait for memory and for one another most of the time,
    which the others fill.
    """
    return torch.cuda.Stream(device, priority=-1)


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
        return ScoringTile(min(queries, 32), 32, 4 if head_size <= 128 else 8, 2, 1, 255)
    # A product that runs on its own keeps its K tile until it is done, beside the two in flight.
    num_tiles = 3 if limits.capability in (9, 10) else 2
    vector = triton.next_power_of_2(head_size) * element_size
    while True:
        needed = (queries + num_tiles * KEY_TILE) * vector + 1024
        if needed <= limits.shared_memory or queries == 16:
            num_warps = 8 if queries >= 128 else 4
            paired = 2 * needed <= limits.shared_memory and limits.capability != 10
            # Blackwell's products keep their sums out of the registers: ptxas chooses well there,
            # but for large heads.
            chosen = limits.capability == 10 and num_warps == 8 and head_size <= 128
            alone = None if chosen else 255
            max_registers = 128 if paired and num_warps == 8 else alone
            return ScoringTile(queries, KEY_TILE, num_warps, 3, 1 + paired, max_registers)
        queries //= 2


def value_tile(key_tile: int, num_chunks: int) -> int:
    """Candidates of a K tile whose value ranges each chunk of the query rows computes.

    The chunks share them evenly where their number is a power of two; otherwise the largest power
    of two of them do. So every launch reads a part of V while it multiplies K.

    >>> value_tile(64, num_chunks=1), value_tile(64, num_chunks=2), value_tile(64, num_chunks=3)
    (64, 32, 32)
    """
    return max(1, key_tile >> num_chunks.bit_length() - 1)


@lru_cache
def distinctness_tile(
    window: int, head_size: int, element_size: int, limits: DeviceLimits
) -> DistinctnessTile:
    """The largest tiles of a whitening's basis, of K and of V that fit beside each other.

    The basis has two parts, or is read anew for each tile of an fp32 V, and two tiles of K and of V
    are on their way. K and V are read once for each tile of the basis, which has all rows of a
    window of 64 at once for every GPU up to D = 128. Smaller tiles of K and V let a second program
    share the SM.

    Args:
        window: W, the rows of the basis.
        head_size: D.
        element_size: bytes of an element of the cache.
        limits: of the device.
    """
    padded = triton.next_power_of_2(head_size)
    # Products in fp32 run on the FMA units, whose operands are registers.
    largest = 32 if element_size == 4 else 64
    rows, keys = min(largest, padded_window(window)), largest

    def fits(programs: int) -> bool:
        needed = (2 * rows + 4 * keys) * padded * element_size + 2048
        return programs * needed <= limits.shared_memory

    if not fits(programs=2):
        keys = 32
    if not fits(programs=2):
        keys = largest
        while not fits(programs=1):
            if keys > 32 or rows == 16:
                keys //= 2
            else:
                rows //= 2
    return DistinctnessTile(rows, keys, 8 if padded > 128 or element_size == 4 else 4)


def padded_window(window: int) -> int:
    """Rows of a tile with a vector for each token of a window: at least 16, for a product."""
    return max(16, triton.next_power_of_2(window))


def scratch_size(num_tasks: int, max_candidates: int, head: HeadScratch) -> int:
    """Bytes of scratch memory that are worth having for evictions of up to this size.

    What all tasks need at once with every split that there may be, but no more than
    ``SCRATCH_BYTES``, unless a single task needs more.

    Args:
        num_tasks: due sequences * layers * KV heads, at most.
        max_candidates: candidates of a head, at most.
        head: what else decides how much a head needs.
    """
    capacity = padded_words(max_candidates)
    all_tasks = num_tasks * head.num_bytes(capacity, MAX_SPLITS)
    return max(min(all_tasks, SCRATCH_BYTES), head.num_bytes(capacity, 1))


def plan_launch(
    num_tasks: int,
    max_candidates: int,
    head: HeadScratch,
    scratch_bytes: int,
    tile: ScoringTile,
    limits: DeviceLimits,
    num_splits: int | None = None,
) -> LaunchPlan:
    """The division of an eviction into launches and splits that takes the least time.

    A program takes as long as its K tiles and its start, and those of an SM take turns, so s splits
    take ``launches * ceil(tasks * s / SMs) * (ceil(tiles / s) + overhead)``. The scratch memory of
    a head grows with the splits, so more splits may mean more launches. The fewest splits win a
    tie.

    One due sequence of Qwen3-8B at budget 4096 on an H200, two, and 64 of them:

    >>> h200 = DeviceLimits(num_sms=132, shared_memory=227 * 1024, capability=9)
    >>> tile = scoring_tile(num_rows=256, head_size=128, element_size=2, limits=h200)
    >>> for num_due in (1, 2, 64):
    ...     num_heads, head = num_due * 36 * 8, HeadScratch(num_rows=256)
    ...     plan = plan_launch(num_heads, 4096, head, SCRATCH_BYTES, tile, h200)
    ...     print(plan.tasks_per_launch, plan.num_splits)
    288 4
    576 2
    1844 1

    Args:
        num_tasks: due sequences * layers * KV heads.
        max_candidates: candidates of the head that has most.
        head: what else decides how much scratch memory a head needs.
        scratch_bytes: bound on the scratch memory.
        tile: of the scoring launches.
        limits: of the device.
        num_splits: programs that share a head; None chooses.

    Raises:
        ValueError: if the scratch of a single head does not fit.
    """
    capacity = padded_words(max_candidates)
    num_tiles = cdiv(capacity, tile.keys)
    choices = range(1, min(MAX_SPLITS, num_tiles) + 1) if head.num_rows else (1,)
    best: tuple[int, LaunchPlan] | None = None
    for splits in choices if num_splits is None else (num_splits,):
        per_task = head.num_bytes(capacity, splits)
        if per_task > scratch_bytes:
            break
        num_launches = cdiv(num_tasks, min(num_tasks, scratch_bytes // per_task))
        tasks = cdiv(num_tasks, num_launches)
        turns = num_launches * cdiv(tasks * splits, limits.num_sms)
        cost = turns * (cdiv(num_tiles, splits) + SPLIT_OVERHEAD)
        if best is None or cost < best[0]:
            best = cost, LaunchPlan(tasks, splits, capacity, tasks * per_task)
    if best is None:
        raise ValueError(
            f"scratch of {scratch_bytes} bytes is too small for {max_candidates} candidates: "
            f"{head.num_bytes(capacity, num_splits or 1)} are needed"
        )
    return best[1]
