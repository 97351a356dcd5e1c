"""Predicts how many sequences fit into a model's KV cache, and how fast they decode.

Blocks are counted as vLLM counts them at start-up: ``num_blocks = KV memory // bytes per block``, a
sequence takes whole blocks, block 0 is the null block, and "Maximum concurrency" is num_blocks over
the blocks of a sequence of ``max_model_len`` tokens. Speeds are those of decode steps in the cost
model (:mod:`vase_vllm.tools.plan.cost`): of a GPU, or of any that is bound by memory.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.layout.token_state import TokenStateLayout
from vase_vllm.tools.plan.cost import (
    Machine,
    ModelShape,
    Shard,
    Step,
    evicting_fraction,
    mean_cached,
    num_blocks_held,
)

MEMORY_UTILIZATION = 0.92
"""vLLM's default of ``--gpu-memory-utilization``; a test holds it equal to the installed vLLM's. It
is not read from there, because that would import torch for a single number."""
MEMORY_BOUND = Machine(bandwidth=1.0)
"""A GPU of 1 byte/s that computes in no time, which is enough for ratios of speeds."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Parse a number of bytes or tokens, such as ``80GiB``, ``12G``, ``12g``, ``12GB`` or ``4096``.

    As in vLLM, a capital letter is a power of two and a small letter is a power of ten: ``12G`` is
    binary. ``GiB`` is always a power of two, and ``GB`` a power of ten.

    Raises:
        ValueError: ``text`` is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKmMgGtT])(i?[bB])?)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 80GiB, 12G, 500MB or a plain number")
    number, unit, suffix = match[1], match[2] or "", (match[3] or "").lower()
    is_binary = unit.isupper() and suffix != "b"
    factor = BINARY_UNITS[unit.upper()] if is_binary or suffix == "ib" else UNITS[unit.lower()]
    return int(float(number) * factor)


def kv_cache_memory(gpu_memory: int, utilization: float, other: int, weights: int) -> int:
    """Bytes that vLLM leaves for the KV cache: ``memory * utilization - other - weights``.

    Raises:
        ValueError: nothing is left.
    """
    left = int(gpu_memory * utilization) - other - weights
    if left <= 0:
        raise ValueError(
            f"the weights do not fit: {format_bytes(weights)} of weights and {format_bytes(other)} "
            f"of --other-memory exceed the {format_bytes(gpu_memory * utilization)} of a GPU; "
            "raise --gpu-memory or --tensor-parallel-size"
        )
    return left


@dataclass(frozen=True)
class Workload:
    """The requests that are served, and the memory that serves them.

    Attributes:
        max_model_len: longest sequence, in tokens.
        block_size: token slots of a block.
        kv_cache_memory: bytes for the KV cache on each GPU.
        mean_prompt_len: mean length of a prompt, in tokens.
        mean_output_len: mean length of an output, in tokens.
        max_num_seqs: most sequences of a step, or None for as many as fit.
    """

    max_model_len: int
    block_size: int
    kv_cache_memory: int
    mean_prompt_len: int
    mean_output_len: int
    max_num_seqs: int | None = None


@dataclass(frozen=True)
class Capacity:
    """What fits and how fast it decodes, with the full cache or at one budget.

    Attributes:
        budget, window: settings of the evictions; None for the full cache.
        state_blocks: blocks of a sequence that hold its query ring, and what its policy keeps of
            each token.
        blocks_per_sequence: blocks of a sequence of ``max_model_len`` tokens, including the state's
            and those of a prompt that is kept.
        max_concurrency: vLLM's "Maximum concurrency": ``num_blocks / blocks_per_sequence``.
        max_sequences: whole sequences that fit besides the null block.
        mean_blocks: blocks that a sequence holds, as the mean over its decode steps.
        mean_cached: tokens that a sequence's attention reads, as the mean over its decode steps.
        batch: sequences of a step when memory is full and each holds ``mean_blocks``; under
            eviction at most those that ``admission: reserve`` admits.
        intensity: operations per byte of that step. Above the GPU's own ratio (about 300 on an
            H100), the step is bound by arithmetic, and a speed-up without a machine is an upper
            bound.
        tokens_per_second: output tokens of all sequences together when memory is full, in decode
            steps of the machine; None without a machine.
        speedup: tokens per second when memory is full, relative to the full cache.
        speedup_equal_batch: the same if both run with the full cache's batch.
        state_share: share of the state in a sequence's blocks.
        eviction_traffic: share of evictions in the bytes that a step moves at ``batch``.
    """

    budget: int | None
    window: int | None
    state_blocks: int
    blocks_per_sequence: int
    max_concurrency: float
    max_sequences: int
    mean_blocks: float
    mean_cached: float
    batch: float
    intensity: float
    tokens_per_second: float | None
    speedup: float
    speedup_equal_batch: float
    state_share: float
    eviction_traffic: float


@dataclass(frozen=True)
class Plan:
    """Capacities of one GPU of a replica; all its GPUs hold their part of the same sequences."""

    kv_bytes_per_token: int
    bytes_per_block: int
    weight_bytes: int
    num_blocks: int
    full: Capacity
    evicting: tuple[Capacity, ...]

    @property
    def capacities(self) -> tuple[Capacity, ...]:
        return self.full, *self.evicting


def make_plan(
    model: ModelShape,
    tensor_parallel_size: int,
    workload: Workload,
    schedules: Sequence[EvictionSchedule],
    machine: Machine | None = None,
    numbers_per_token: int = 0,
) -> Plan:
    """Compute the capacities with the full cache and with each schedule.

    Args:
        machine: the GPU; without one, steps are taken to be bound by memory.
        numbers_per_token: that the policy keeps of each token (``Policy.num_numbers``).

    Raises:
        ValueError: not even one sequence fits; the message is one line with the remedy.
    """
    shard = Shard(model, tensor_parallel_size)
    bytes_per_block = shard.kv_bytes_per_token * workload.block_size
    num_blocks = workload.kv_cache_memory // bytes_per_block
    full = _Run(shard, workload, num_blocks, machine)
    needed = full.blocks_per_sequence
    if num_blocks < 2:
        raise ValueError(
            f"{format_bytes(workload.kv_cache_memory)} of KV cache memory hold no block of "
            f"{format_bytes(bytes_per_block)} besides the null block: "
            "raise --gpu-memory or --tensor-parallel-size"
        )
    runs = [
        _Run(shard, workload, num_blocks, machine, schedule, numbers_per_token)
        for schedule in schedules
    ]
    smallest = min(run.blocks_per_sequence for run in [full, *runs])
    if num_blocks <= smallest:
        raise ValueError(
            f"not one sequence of {workload.max_model_len} tokens fits: it takes "
            f"{needed} of {num_blocks - 1} usable blocks, {smallest} at the smallest budget; "
            "raise --gpu-memory or lower --max-model-len"
        )
    most = [run.most_blocks for run in runs if run.blocks_per_sequence < num_blocks]
    if most and num_blocks <= min(most):
        raise ValueError(
            f"a prompt of {workload.mean_prompt_len} tokens does not fit: it takes {min(most)} of "
            f"{num_blocks - 1} usable blocks until its first eviction; raise --gpu-memory or lower "
            "--mean-prompt-len"
        )
    return Plan(
        kv_bytes_per_token=shard.kv_bytes_per_token,
        bytes_per_block=bytes_per_block,
        weight_bytes=round(shard.weight_bytes),
        num_blocks=num_blocks,
        full=full.capacity(full),
        evicting=tuple(run.capacity(full) for run in runs),
    )


class _Run:
    """The full cache, or one eviction schedule, on one workload."""

    def __init__(
        self,
        shard: Shard,
        workload: Workload,
        num_blocks: int,
        machine: Machine | None,
        schedule: EvictionSchedule | None = None,
        numbers_per_token: int = 0,
    ) -> None:
        self.shard, self.workload = shard, workload
        self.num_blocks, self.state_blocks, first = num_blocks, 0, 0
        self.machine = machine
        self.budget = schedule.budget if schedule else None
        prompt, output = workload.mean_prompt_len, workload.mean_output_len
        if schedule is not None:
            schedule = schedule.for_prompt(prompt)
            first = schedule.first_eviction(prompt)
            ring = RingLayout(schedule.window, shard.group_size, workload.block_size)
            numbers = TokenStateLayout(
                numbers_per_token, schedule.budget, workload.block_size, shard.cell_bytes
            )
            self.state_blocks = ring.num_blocks + numbers.num_blocks
        self.schedule = schedule
        size = workload.block_size
        self.blocks_per_sequence = num_blocks_held(
            workload.max_model_len, size, schedule, self.state_blocks
        )
        ends = range(prompt + 1, prompt + output + 1)
        held = (num_blocks_held(end, size, schedule, self.state_blocks, first) for end in ends)
        self.mean_blocks = sum(held) / output
        self.mean_cached = mean_cached(prompt, output, schedule)
        self.evicting = evicting_fraction(prompt, output, schedule) if schedule else 0.0
        # Of a sequence of this workload, at its first eviction.
        self.most_blocks = self.blocks_per_sequence
        self.batch = (num_blocks - 1) / self.mean_blocks
        if workload.max_num_seqs is not None:
            self.batch = min(self.batch, workload.max_num_seqs)
        if schedule is not None:
            longest = min(first, workload.max_model_len)
            self.most_blocks = num_blocks_held(longest, size, schedule, self.state_blocks, first)
            self.batch = min(self.batch, (num_blocks - 1) // self.reserved_blocks)

    @property
    def reserved_blocks(self) -> float:
        """Blocks that ``admission: reserve`` keeps for a sequence under eviction, as the mean.

        The engine keeps the most that a request can come to hold, whose output it takes to be as
        long as ``max_model_len`` allows: before its first eviction what it holds at that, then what
        it holds at its bound.
        """
        growing = 1 - self.evicting
        return self.blocks_per_sequence + growing * (self.most_blocks - self.blocks_per_sequence)

    def step(self, batch: float) -> Step:
        return self.shard.step(batch, self.mean_cached, self.schedule, self.evicting)

    def throughput(self, batch: float) -> float:
        """Tokens per second; without a machine, tokens per byte moved."""
        return batch / self.step(batch).seconds(self.machine or MEMORY_BOUND)

    def capacity(self, full: "_Run") -> Capacity:
        step, schedule = self.step(self.batch), self.schedule
        return Capacity(
            budget=self.budget,
            window=schedule.window if schedule else None,
            state_blocks=self.state_blocks,
            blocks_per_sequence=self.blocks_per_sequence,
            max_concurrency=self.num_blocks / self.blocks_per_sequence,
            max_sequences=(self.num_blocks - 1) // self.blocks_per_sequence,
            mean_blocks=self.mean_blocks,
            mean_cached=self.mean_cached,
            batch=self.batch,
            intensity=step.operations / step.num_bytes,
            tokens_per_second=self.throughput(self.batch) if self.machine else None,
            speedup=self.throughput(self.batch) / full.throughput(full.batch),
            speedup_equal_batch=self.throughput(full.batch) / full.throughput(full.batch),
            state_share=self.state_blocks / self.blocks_per_sequence,
            eviction_traffic=step.eviction.num_bytes / step.num_bytes,
        )


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes with a binary unit, such as ``144.0 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
