"""A replica: one engine that batches continuously, as a process of the simulation.

It keeps vLLM's rules: first come, first served; a request is admitted when its prompt's blocks are
free; when blocks run out, the youngest request loses its cache and waits to be recomputed.
Prefix caching finds what is left of its blocks, as far as nobody has overwritten them since; the
full cache has it on, eviction has it off.
Between two changes of the batch it advances several steps at once, at the step time of
:mod:`vase_vllm.tools.plan.cost`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simpy

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.plan.cost import Machine, Part, Shard, num_blocks_held


def prefill(shard: Shard, num_tokens: int) -> Part:
    """Count the prefill of a prompt in the same step as decodes, which read the weights.

    The operations are those of the linear layers and ``2 n^2 l Q D`` of causal attention. The bytes
    are those of the KV cache that is written.
    """
    model = shard.model
    attention = 2 * num_tokens**2 * model.num_layers * shard.num_query_heads * model.head_size
    return Part(
        num_tokens * shard.kv_bytes_per_token, shard.linear_operations(num_tokens) + attention
    )


@dataclass
class Request:
    """A request, and how it went.

    Attributes:
        arrival: seconds.
        prompt, output: tokens.
        finish: seconds, or infinity while it is not done.
        position: tokens that it has, prompt and output.
        first: position of its first eviction.
        preemptions: how often it lost its cache.
    """

    arrival: float
    prompt: int
    output: int
    finish: float = float("inf")
    position: int = 0
    first: int = 0
    mark: float = float("-inf")
    preemptions: int = 0

    @property
    def seconds_per_token(self) -> float:
        """From arrival to the last token, waiting included, over the output's length."""
        return (self.finish - self.arrival) / self.output


@dataclass(frozen=True)
class Settings:
    """A replica's GPUs and its policy.

    Attributes:
        shard: the model's part on each GPU.
        machine: a GPU.
        num_blocks: blocks of the pool, the null block among them.
        block_size: token slots of a block.
        max_num_seqs: most sequences of a step.
        schedule: of the evictions, or None for the full cache.
        state_blocks: blocks of a query ring.
        quantum: most steps at once; a new request waits for their end.
    """

    shard: Shard
    machine: Machine
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    schedule: EvictionSchedule | None = None
    state_blocks: int = 0
    quantum: int = 32

    def first_eviction(self, prompt: int) -> int:
        """Position of a request's first eviction; beyond reach for the full cache."""
        return self.schedule.first_eviction(prompt) if self.schedule else np.iinfo(np.int64).max

    def blocks(self, ends: np.ndarray, first: np.ndarray) -> np.ndarray:
        """[n] blocks that sequences hold when their next step ends at ``ends`` tokens."""
        token_blocks = cdiv(ends, self.block_size)
        if self.schedule is None:
            return token_blocks
        slots = np.where(ends > first, self.schedule.bound, first)
        complete = self.state_blocks + cdiv(slots, self.block_size)
        return np.where(ends > self.schedule.first_query(first), complete, token_blocks)

    def admission_blocks(self, request: Request) -> int:
        """Blocks that a request needs to start; a recomputed one peaks at its first eviction."""
        peak = min(request.position + 1, request.first)
        return num_blocks_held(
            peak, self.block_size, self.schedule, self.state_blocks, request.first
        )

    def attended(self, positions: np.ndarray, first: np.ndarray, steps: int) -> np.ndarray:
        """[n] tokens that sequences attend to, on average over the next steps."""
        growing = positions + (steps + 1) / 2
        if self.schedule is None:
            return growing
        sawtooth = self.schedule.budget + (self.schedule.window + 1) / 2
        return np.where(positions >= first, sawtooth, growing)


class Replica:
    """The process. ``waiting`` is filled by :meth:`submit`."""

    def __init__(self, environment: simpy.Environment, settings: Settings) -> None:
        self.environment, self.settings = environment, settings
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.blocks_given = 0
        self.busy_seconds = 0.0
        self.sequence_seconds = 0.0
        self._alarm = environment.event()
        environment.process(self._run())

    @property
    def load(self) -> int:
        """Requests that are not done."""
        return len(self.waiting) + len(self.running)

    def submit(self, request: Request) -> None:
        request.position = request.prompt
        request.first = self.settings.first_eviction(request.prompt)
        self.waiting.append(request)
        if not self._alarm.triggered:
            self._alarm.succeed()

    def _run(self) -> Iterator[simpy.Event]:
        while True:
            if not self.load:
                self._alarm = self.environment.event()
                yield self._alarm
            prefill = self._admit()
            steps = self._fit()
            seconds = prefill + steps * self._step_seconds(steps)
            self.busy_seconds += seconds
            self.sequence_seconds += seconds * len(self.running)
            yield self.environment.timeout(seconds)
            self._advance(steps)

    def _state(self) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions of the running requests and their first evictions."""
        positions = np.array([request.position for request in self.running], dtype=np.int64)
        first = np.array([request.first for request in self.running], dtype=np.int64)
        return positions, first

    def _admit(self) -> float:
        """Start what fits; seconds of reading its prompts."""
        settings, seconds = self.settings, 0.0
        if not self.waiting:
            return seconds
        positions, first = self._state()
        free = settings.num_blocks - 1 - int(settings.blocks(positions + 1, first).sum())
        while self.waiting and len(self.running) < settings.max_num_seqs:
            needed = settings.admission_blocks(self.waiting[0])
            if needed > free:
                break
            request = self.waiting.popleft()
            self.running.append(request)
            free -= needed
            read = self._num_lost(request)
            self.blocks_given += cdiv(read, settings.block_size)
            seconds += prefill(settings.shard, read).seconds(settings.machine)
        if not self.running:
            raise ValueError("a request does not fit into a replica: give it more GPUs")
        return seconds

    def _num_lost(self, request: Request) -> int:
        """Tokens to read at admission: all, or those that prefix caching finds no more.

        Others take free blocks oldest first, and a preempted request's from its end.
        """
        if self.settings.schedule is not None:
            return request.position
        overwritten = (self.blocks_given - request.mark) * self.settings.block_size
        return int(max(1, min(request.position, overwritten)))

    def _fit(self) -> int:
        """Steps until a request ends, after preempting the youngest if their blocks do not fit."""
        while True:
            left = min(
                request.prompt + request.output - request.position for request in self.running
            )
            steps = min(self.settings.quantum, left)
            positions, first = self._state()
            needed = int(self.settings.blocks(positions + steps, first).sum())
            if needed < self.settings.num_blocks or len(self.running) == 1:
                held = int(self.settings.blocks(positions, first).sum())
                self.blocks_given += max(0, needed - held)
                return steps
            youngest = self.running.pop()
            youngest.preemptions += 1
            youngest.mark = self.blocks_given
            self.waiting.appendleft(youngest)

    def _step_seconds(self, steps: int) -> float:
        settings = self.settings
        positions, first = self._state()
        attended = settings.attended(positions, first, steps)
        evicting = float((positions >= first).mean())
        step = settings.shard.step(
            len(self.running), float(attended.mean()), settings.schedule, evicting
        )
        return step.seconds(settings.machine)

    def _advance(self, steps: int) -> None:
        for request in self.running:
            request.position += steps
            if request.position >= request.prompt + request.output:
                request.finish = self.environment.now
        self.running = [request for request in self.running if request.finish == float("inf")]
