"""Blocks of a sequence under eviction: the KV cache spec and its block manager.

A row of the block table holds, in this order::

    first | key | budget | kept | blocks of the tokens' slots ... | state blocks ...

The first four are not blocks but numbers that travel to the workers where block ids do (see
:class:`RowHeader`). That way they live exactly as long as the request's blocks, under both model
runners, through preemption and reordering, and nobody has to keep them in step.
The state blocks hold the last ``window`` queries of the sequence (the query ring), and the numbers
that a policy carries with each token, in the pages of the same layers: allocated, accounted and
freed with the rest. They come with the first query that
is kept, a window before the first eviction, behind the token blocks of that eviction, so that a
row only ever grows at its end. What a long prompt held above the bound is given back after its
first eviction, and null blocks take its place.
The blocks that a kept prompt fills are never written again once they are computed: sequences whose
prompts begin alike share them through vLLM's prefix cache.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vase_vllm.engine.admission import (
    AdmissionAnswer,
    AdmissionContext,
    Expectation,
    expected_peak,
)
from vase_vllm.engine.prefix_cache import BlockPair, PrefixCache
from vase_vllm.engine.row_header import SequenceNumbers, content_key, sequence_numbers
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader


class EvictionManager(FullAttentionManager):
    """Gives each sequence the blocks of its slots, never more than the schedule needs."""

    kv_cache_spec: EvictionSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prefix_cache = PrefixCache(self.block_pool, self.kv_cache_group_id, self.block_size)
        # What each running sequence can still come to need, and the sum, which every admission asks
        # for: it changes only where blocks are allocated or freed.
        self._missing: dict[str, int] = {}
        self._num_missing = 0
        # How many tokens each running sequence's row has blocks for. Nearly every step of a decode
        # asks twice whether one more fits, and it does.
        self._room: dict[str, int] = {}
        self._num_released = 0
        self._latest_expectation = Expectation()
        self.latest_admission: AdmissionAnswer | None = None

    def bind(self, context: AdmissionContext) -> None:
        """Learn what the scheduler knows; it calls this once, before there is any request."""
        self._context = context

    def numbers(self, request_id: str) -> SequenceNumbers:
        """What a sequence's row says of its schedule, or will say once there is one."""
        if row := self.req_to_blocks.get(request_id):
            return SequenceNumbers(
                row[BlockTableRow.FIRST].block_id,
                row[BlockTableRow.BUDGET].block_id,
                row[BlockTableRow.KEPT].block_id,
            )
        request = self._context.requests[request_id]
        return sequence_numbers(self._context.config, request, self._context.longest(request))

    def first_eviction(self, request_id: str) -> int:
        """Position of a sequence's first eviction."""
        if row := self.req_to_blocks.get(request_id):
            return row[BlockTableRow.FIRST].block_id
        return self.numbers(request_id).first

    def _bound(self, request_id: str) -> int:
        """Most tokens that a sequence holds once it has evicted."""
        return self.numbers(request_id).budget + self.kv_cache_spec.schedule.window

    def _num_missing_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks that a sequence still needs to reach ``num_tokens`` tokens."""
        if num_tokens <= self._room.get(request_id, 0):
            return 0
        first = self.first_eviction(request_id)
        num_required = self.kv_cache_spec.num_row_blocks(num_tokens, first)
        if row := self.req_to_blocks.get(request_id):
            return max(num_required - (len(row) - BlockTableRow.NUM_HEADER), 0)
        return num_required - self._num_shared(request_id, self._prefix_cache.held(request_id))

    def _num_shared(self, request_id: str, cached_blocks: Sequence[KVCacheBlock]) -> int:
        """How many of the cached blocks that a prompt begins with a sequence takes as its own.

        Those that its kept prompt fills; the others, into which it may write, it gets copies of.
        """
        return min(len(cached_blocks), self.numbers(request_id).kept // self.block_size)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that a sequence still needs to reach ``num_tokens`` tokens.

        For admission (``apply_admission_cap``) that is the most it holds on the way: a preempted
        sequence recomputes its output, evicting as it goes, and peaks at its first eviction. With
        ``admission: reserve`` it is the most that the sequence will ever hold and what all running
        ones still need to get to theirs, so that none is preempted later; with ``expected`` it is
        the same for what they will probably hold.

        Cached blocks that the prompt begins with are needed beside its own, until they are copied,
        or in the place of its own where they are shared.
        """
        num_held = 0
        if new_computed_blocks:
            num_held = self._get_num_evictable_blocks(new_computed_blocks)
            num_held -= self._num_shared(request_id, new_computed_blocks)
        num_own = self._num_missing_blocks(request_id, num_tokens)
        if not apply_admission_cap:
            return num_held + num_own
        num_kept_free = 0
        if self._context.config.admission != "optimistic":
            num_promised = self._num_blocks_promised(and_to=request_id)
            num_kept_free = max(num_promised - num_own, 0)
        num_free = self.block_pool.get_num_free_blocks()
        self.latest_admission = AdmissionAnswer(num_kept_free, num_free)
        return num_held + num_own + num_kept_free

    def _num_blocks_promised(self, and_to: str | None = None) -> int:
        """Blocks that the running sequences, and one more, can or probably will come to need."""
        num_most = self._num_missing
        if and_to is not None:
            num_most += self._num_missing_at_most(and_to) - self._missing.get(and_to, 0)
        if self._context.config.admission == "expected":
            latest = self._latest_expectation
            if not latest.holds_for(and_to):
                latest.set(and_to, self._num_blocks_expected(and_to))
            return min(latest.num_blocks, num_most)
        return num_most

    @property
    def num_outstanding(self) -> int:
        """Blocks that the running sequences can still come to need, at most."""
        return self._num_missing

    def _num_missing_at_most(self, request_id: str) -> int:
        """Blocks that a sequence can still come to need beside those that it holds."""
        longest = self._context.longest(self._context.requests[request_id])
        return self._num_missing_blocks(request_id, longest)

    def _num_blocks_expected(self, and_to: str | None) -> int:
        """Blocks beyond those they hold that the running sequences, and one more, probably need."""
        running = [id for id, row in self.req_to_blocks.items() if row and id != and_to]
        requests = [self._context.requests[id] for id in running if id in self._context.requests]
        if and_to is not None:
            requests.append(self._context.requests[and_to])
        if not requests:
            return 0
        num_prompt = np.array([request.num_prompt_tokens for request in requests])
        so_far = np.array([request.num_output_tokens for request in requests])
        longest = np.array([self._context.longest(request) for request in requests])
        first = np.array([self.first_eviction(request.request_id) for request in requests])
        peak = expected_peak(
            self._context.output_lengths,
            num_prompt=num_prompt,
            so_far=so_far,
            remaining=longest - num_prompt - so_far,
            first=first,
            first_query=self.kv_cache_spec.schedule.first_query(first),
            num_complete=np.array([self._num_complete_blocks(request) for request in requests]),
            block_size=self.block_size,
        )
        return max(peak - sum(self._num_held_blocks(request) for request in requests), 0)

    def _num_complete_blocks(self, request: Request) -> int:
        """Blocks that a sequence holds, or would hold, once a query of it is kept."""
        first = self.first_eviction(request.request_id)
        has_evicted = request.num_computed_tokens >= first
        num_slots = self._bound(request.request_id) if has_evicted else first
        return self.kv_cache_spec.num_blocks(num_slots)

    def _num_held_blocks(self, request: Request) -> int:
        """Blocks that a sequence holds now."""
        row = self.req_to_blocks.get(request.request_id)
        if not row:
            return 0
        num_blocks = len(row) - BlockTableRow.NUM_HEADER
        surplus = self._surplus(request.request_id)
        if request.num_computed_tokens > self.first_eviction(request.request_id):
            num_blocks -= surplus.stop - surplus.start - self._num_held_surplus(row, surplus)
        return num_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take note of the cached blocks that a prompt begins with."""
        self._prefix_cache.hold(request_id, list(new_computed_blocks))
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Append blocks to the sequence's row; a new row starts with its header."""
        num_missing = self._num_missing_blocks(request_id, num_tokens)
        if num_missing == 0:
            return []
        row = self.req_to_blocks[request_id]
        blocks = self.block_pool.get_new_blocks(num_missing)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in blocks)
        if row:
            row.extend(blocks)
            self._row_has_grown(request_id, row)
            return blocks
        held = self._prefix_cache.held(request_id)
        shared = held[: self._num_shared(request_id, held)]
        self._latest_expectation.admitted(request_id, len(shared) + len(blocks))
        first, budget, kept = self.numbers(request_id)
        key = content_key(self._context.requests[request_id])
        header = RowHeader(first, key, budget, kept)
        row.extend([*(KVCacheBlock(block_id=number) for number in header), *shared, *blocks])
        self._prefix_cache.restore(request_id, row[BlockTableRow.NUM_HEADER :], len(shared))
        self._row_has_grown(request_id, row)
        return list(row)

    def _row_has_grown(self, request_id: str, row: Sequence[KVCacheBlock]) -> None:
        """Take note of what a sequence's row suffices for now, and of what it can still need."""
        first = row[BlockTableRow.FIRST].block_id
        num_blocks = len(row) - BlockTableRow.NUM_HEADER
        self._room[request_id] = self.kv_cache_spec.num_tokens_of_row(num_blocks, first)
        self._set_missing(request_id, self._num_missing_at_most(request_id))

    def _set_missing(self, request_id: str, num_blocks: int) -> None:
        """Take note of what a sequence can still come to need."""
        self._num_missing += num_blocks - self._missing.pop(request_id, 0)
        if num_blocks:
            self._missing[request_id] = num_blocks

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Put the blocks of the prompt into the prefix cache.

        The blocks of a kept prompt are themselves put there as soon as they will be computed, as
        vLLM does; of others copies, of what earlier steps have computed.

        Outputs are not cached: their end is evicted, and copying the rest would cost every step.
        Nor is what a bounded prefill computes after its first eviction, which rearranges the blocks
        once this step's copies are made.
        """
        start = self.num_cached_block.get(request.request_id, 0)
        if start >= request.num_prompt_tokens // self.block_size:
            # As in nearly every decode step.
            return
        first, _, kept = self.numbers(request.request_id)
        num_computed = num_tokens if kept else min(request.num_computed_tokens, first)
        stop = min(num_computed, request.num_prompt_tokens) // self.block_size
        if start >= stop:
            return
        # Where there is no room now there is no second try: it would be asked for in every step.
        self.num_cached_block[request.request_id] = stop
        own = self.req_to_blocks[request.request_id][BlockTableRow.NUM_HEADER :]
        if kept:
            self._prefix_cache.publish_own(request, own, start, stop)
            return
        num_spare = self.block_pool.get_num_free_blocks() - self._num_blocks_promised()
        self._prefix_cache.publish(request, own, start, stop, num_spare)

    def num_ready(self, request_id: str, cached_blocks: Sequence[KVCacheBlock]) -> int:
        """Tokens of a hit that a sequence may take in this step.

        What it shares may be computed in the same step; of what it gets copies must be there.
        """
        num_shared = self._num_shared(request_id, cached_blocks)
        num_copied = self._prefix_cache.num_computed(cached_blocks[num_shared:])
        return (num_shared + num_copied) * self.block_size

    def take_pending_cow_copies(self) -> list[BlockPair]:
        """Block copies that the workers make before the step."""
        self._prefix_cache.start_step()
        return self._prefix_cache.copies.take()

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what a long prompt held above the bound, once its first eviction has run."""
        row = self.req_to_blocks.get(request_id)
        if not row or processed_computed_tokens <= row[BlockTableRow.FIRST].block_id:
            return
        surplus = self._surplus(request_id)
        if num_surplus := self._num_held_surplus(row, surplus):
            blocks = row[surplus]
            row[surplus] = [self._null_block] * num_surplus
            self.block_pool.free_blocks(reversed(blocks))
            self._num_released += num_surplus

    def _surplus(self, request_id: str) -> slice:
        """Columns of what the first eviction drops whole: the token blocks above the bound."""
        ends = self._bound(request_id), self.first_eviction(request_id)
        return slice(*(BlockTableRow.NUM_HEADER + cdiv(end, self.block_size) for end in ends))

    def _num_held_surplus(self, row: Sequence[KVCacheBlock], surplus: slice) -> int:
        """How many of the blocks above the bound a row that has evicted still holds."""
        if surplus.start == surplus.stop or row[surplus.start].is_null:
            return 0
        return surplus.stop - surplus.start

    def take_num_released(self) -> int:
        """Blocks that sequences have given back at their first eviction since the last call."""
        num_released, self._num_released = self._num_released, 0
        return num_released

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The sequence's real blocks; the header is no block and must not reach the pool."""
        self._room.pop(request_id, None)
        self._set_missing(request_id, 0)
        self._latest_expectation.forget()
        blocks = super().pop_blocks_for_free(request_id)[BlockTableRow.NUM_HEADER :]
        self._prefix_cache.withdraw(blocks)
        return blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Nothing that attention could read once for all sequences: rows differ in their front."""
        return 0
