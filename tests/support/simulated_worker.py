"""vLLM's scheduler under eviction with a worker that only keeps books.

It does to a memory of names what a worker does to keys, values and queries: the block copies, the
evictions, the new tokens, the query ring, each where the scheduler's messages say. A name stands
for all that a key depends on, so that a wrong or stale block is found wherever it comes from.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.common.lone_scheduler import Requests, scheduler_of
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.block_manager import EvictionManager
from vase_vllm.engine.row_header import content_key
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.engine.statistics import EvictionStatistics
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import NEVER, BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.worker.query_ring import TorchRingWrite

EVICTED = "evicted"
STOP_TOKEN = 3
GROUP_SIZE = 1


def make_scheduler(
    model: Path,
    eviction: dict[str, Any],
    block_size: int,
    num_blocks: int,
    chunk: int,
    log_stats: bool = False,
) -> Scheduler:
    """The scheduler that an engine with these settings gets, for one group of one layer.

    Args:
        num_blocks: of the pool, the null block among them.
        chunk: most tokens of a step.
        log_stats: whether it counts for `/metrics`.
    """
    arguments = EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=512,
        block_size=block_size,
        max_num_batched_tokens=chunk,
        max_num_seqs=8,
        additional_config={"kv_eviction": eviction},
    )
    config = arguments.create_engine_config()
    schedule = EvictionConfig.parse(eviction).schedule
    spec = EvictionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        schedule=schedule,
        num_state_blocks=RingLayout(schedule.window, GROUP_SIZE, block_size).num_blocks,
    )
    return scheduler_of(config, spec, num_blocks, log_stats)


class Simulation:
    """Runs requests to their end, one step at a time, and checks every step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        assert isinstance(manager, EvictionManager)
        self.manager = manager
        self.spec = manager.kv_cache_spec
        config = EvictionConfig.from_vllm(scheduler.vllm_config)
        assert config is not None
        self.config = config
        self.pool = manager.block_pool
        self.memory: dict[int, list[Any]] = {}
        # State block to the queries of its ring entries.
        self.rings: dict[int, dict[int, Any]] = {}
        self.ring = RingLayout(self.spec.schedule.window, GROUP_SIZE, self.spec.block_size)
        self.rows: dict[str, list[int]] = {}
        self.num_cached_tokens: dict[str, int] = {}
        self.stops_at: dict[str, int | None] = {}
        self.num_evictions = 0
        self.num_output_tokens: dict[str, int] = {}
        # Of each step, where the scheduler counts for `/metrics`.
        self.statistics: list[EvictionStatistics] = []
        self._requests = Requests(manager.block_size)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        stops_at: int | None = None,
        own: dict[str, Any] | None = None,
    ) -> None:
        """Queue a request, which stops by itself after ``stops_at`` tokens.

        Args:
            own: its own settings of eviction.
        """
        self.stops_at[request_id] = stops_at
        request = self._requests.make(request_id, prompt, max_tokens, STOP_TOKEN, own)
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        """What a client that hangs up does; one that has finished or not come yet is none."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that are not free; the null block does not count."""
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()

    def step(self) -> None:
        """One step of the scheduler and of the worker."""
        output = self.scheduler.schedule()
        for request in output.scheduled_new_reqs:
            self.rows[request.req_id] = list(request.block_ids[0])
            self.num_cached_tokens[request.req_id] = request.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                self.rows[request_id] = []
            self.rows[request_id] += block_ids[0] if block_ids else []
        copies = output.kv_cache_block_copies or []
        assert len({copy.dst_block_id for copy in copies}) == len(copies)
        # All at once, as the workers do: what is written is not what is read.
        copied = [self.memory[copy.src_block_id][:] for copy in copies]
        self.memory |= {copy.dst_block_id: c for copy, c in zip(copies, copied, strict=True)}
        computed = {
            request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs
        }
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            stop = computed[request_id] + num_tokens
            self._compute(request, computed[request_id], stop)
            is_last = request.num_output_tokens + 1 == self.stops_at[request_id]
            token = STOP_TOKEN if is_last else stop % STOP_TOKEN
            sampled.append([token] if stop >= request.num_tokens else [])
        self._check_blocks()
        request_ids = list(output.num_scheduled_tokens)
        index = {request_id: number for number, request_id in enumerate(request_ids)}
        given = self.scheduler.update_from_output(
            output, ModelRunnerOutput(request_ids, index, sampled)
        )
        if 0 in given and (stats := given[0].scheduler_stats) is not None:
            self.statistics.append(EvictionStatistics.take_from(stats))
        for of_request in given[0].outputs if 0 in given else ():
            length = self.num_output_tokens.get(of_request.request_id, 0)
            self.num_output_tokens[of_request.request_id] = length + len(of_request.new_token_ids)

    def _compute(self, request: Request, start: int, stop: int) -> None:
        row = self.rows[request.request_id]
        header = RowHeader(*row[: BlockTableRow.NUM_HEADER])
        assert header == self._expected_header(request)
        first, kept = header.first, header.kept
        token_blocks = row[BlockTableRow.NUM_HEADER :][: cdiv(first, self.spec.block_size)]
        schedule = self.spec.schedule.with_budget(header.budget)
        assert stop - start <= schedule.tokens_until_eviction(start, first)
        if schedule.due(start, first):
            self.num_evictions += 1
            self._check_ring(request, row, start)
            num_slots = len(token_blocks) * self.spec.block_size
            for slot in range(kept, min(schedule.num_cached(start, first), num_slots)):
                self._cell(token_blocks, slot, EVICTED)
        tokens = request.all_token_ids
        for position in range(start, stop):
            slot = schedule.slots(position, first)
            self._cell(token_blocks, slot, tuple(tokens[: position + 1]))
        self._store_queries(request, row, start, stop)
        for position in range(stop if stop <= first else kept):
            block, cell = divmod(position, self.spec.block_size)
            found = self.memory[token_blocks[block]][cell]
            assert found == tuple(tokens[: position + 1]), (request.request_id, position)

    def _expected_header(self, request: Request) -> RowHeader:
        own, config = request.sampling_params.extra_args or {}, self.config
        num_prompt, budget = request.num_prompt_tokens, own.get("kv_eviction_budget", config.budget)
        never = own.get("kv_eviction") == "none"
        keeps = own.get("kv_eviction_prompt", config.prompt) == "keep"
        kept = num_prompt if keeps else 0
        first = self.spec.schedule.with_budget(budget + kept).first_eviction(num_prompt)
        longest = min(num_prompt + request.max_tokens, self.scheduler.max_model_len)
        # An eviction precedes the step of position `first`, and the last token has no such step.
        if never or longest < first + 2:
            first, kept, budget = NEVER, num_prompt, config.budget
        return RowHeader(first, content_key(request), budget + kept, kept)

    def _store_queries(self, request: Request, row: list[int], start: int, stop: int) -> None:
        """Write a chunk's queries where the real worker would."""
        positions = np.arange(start, stop)
        rows = np.zeros_like(positions)
        write = TorchRingWrite.plan(self.ring, np.array([row]), rows, positions, np.array([stop]))
        if write is None:
            return
        if write.tokens is not None:
            positions = positions[write.tokens.numpy()]
        tokens = request.all_token_ids
        for position, block, entry in zip(
            positions.tolist(), write.blocks.tolist(), write.entries.tolist(), strict=True
        ):
            assert block != 0, "the null block was written"
            self.memory.pop(block, None)
            self.rings.setdefault(block, {})[entry] = tuple(tokens[: position + 1])

    def _check_ring(self, request: Request, row: list[int], start: int) -> None:
        """An eviction reads the queries of the window in front of it."""
        tokens, window = request.all_token_ids, self.ring.window
        front = BlockTableRow.NUM_HEADER + cdiv(row[BlockTableRow.FIRST], self.spec.block_size)
        for position in range(start - window, start):
            column, entry = divmod(position % window, self.ring.entries_per_block)
            found = self.rings[row[front + column]][entry]
            assert found == tuple(tokens[: position + 1]), (request.request_id, position)

    def _cell(self, token_blocks: list[int], slot: int, name: Any) -> None:
        block, cell = divmod(slot, self.spec.block_size)
        self.rings.pop(token_blocks[block], None)
        names = self.memory.setdefault(token_blocks[block], [None] * self.spec.block_size)
        names[cell] = name

    def _check_blocks(self) -> None:
        """Nothing that may be written is another's, or in the prefix cache, which is right."""
        own, lasting = [], set()
        for row in self.manager.req_to_blocks.values():
            if not row:
                continue
            num_lasting = row[BlockTableRow.KEPT].block_id // self.spec.block_size
            blocks = row[BlockTableRow.NUM_HEADER :]
            lasting |= {block.block_id for block in blocks[:num_lasting]}
            # Null blocks stand for what has been given back.
            own += [block for block in blocks[num_lasting:] if not block.is_null]
        manager = self.manager
        missing = sum(
            manager._num_missing_at_most(request_id)
            for request_id, row in manager.req_to_blocks.items()
            if row
        )
        assert manager._num_missing == missing
        ids = {block.block_id for block in own}
        assert len(ids) == len(own)
        assert not ids & lasting
        assert all(block.block_hash is None for block in own)
        cached = [block for block in self.pool.blocks if block.block_hash is not None]
        for block in cached:
            names = self.memory[block.block_id]
            lengths = [len(name) for name in names]
            assert EVICTED not in names
            assert lengths == list(range(lengths[0], lengths[0] + len(lengths)))
