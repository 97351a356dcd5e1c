"""Traps that other ports fell into, at the level of one builder's step: no engine, real pages.

The int32 overflow of a slot offset in a large pool is tested where the offsets are computed:
``test_slot_offset_beyond_int32_in_a_large_pool`` (eviction), ``test_ring_slot_offset_beyond_int32_
in_a_large_pool`` (query ring) and ``test_int32_overflow_of_a_slot_in_a_large_pool`` (remapping).
The traps that need an engine are in ``tests/end_to_end`` and ``tests/engine``:
``test_v2_silently_not_evicting``, ``test_stale_counts_under_async_scheduling``,
``test_requests_swap_rows_between_steps`` and ``test_eviction_in_the_middle_of_a_chunked_prefill``.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.kernels.paged_case import Case, Pool, Sequence, assert_numbers
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.worker.counters import EvictionCounters
from vase_vllm.worker.row_headers import RowHeaders
from vase_vllm.worker.triton_path import TritonPath

CONFIG = EvictionConfig.parse({"budget": 40, "window": 8, "protected": 10})
FIRST = CONFIG.budget + CONFIG.window
MAX_MODEL_LEN = 1024
PAD_SLOT = -1


class Worker:
    """One builder's path over a pool of pages, and the persistent buffers of a model runner.

    The pool's sequences are running requests of runner V2, which numbers them from the end.
    """

    def __init__(self, sequences, max_rows=6, config=CONFIG):
        case = Case(config.fused, tuple(sequences), layers=(3, 5))
        self.case, self.pool = case, Pool(case)
        self.max_rows = max_rows
        names = [f"request {row}" for row in range(len(sequences))]
        self.indices = np.arange(len(sequences))[::-1].copy()
        by_id = dict(zip(names, self.indices.tolist(), strict=True))
        runner = SimpleNamespace(req_states=SimpleNamespace(req_id_to_index=by_id))
        row_headers = RowHeaders(runner, max_rows)
        new = [
            SimpleNamespace(req_id=name, block_ids=(row,))
            for name, row in zip(names, self.pool.block_table.tolist(), strict=True)
        ]
        message = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new)
        row_headers.observe(message, group=0)
        self.counters = EvictionCounters(num_layers=len(case.layers))
        context = SimpleNamespace(
            config=config,
            vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=max_rows)),
            device=torch.device("cpu"),
            counters=self.counters,
            row_headers=row_headers,
            kv_heads=torch.arange,
            observer=None,
            scratch=None,
        )
        spec = EvictionSpec(
            block_size=case.block_size,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            dtype=case.dtype,
            schedule=EvictionSchedule(CONFIG.budget, CONFIG.window),
            num_state_blocks=case.num_state_blocks,
        )
        layers = {
            index: SimpleNamespace(
                num_heads=case.num_kv_heads * case.group_size,
                num_kv_heads=case.num_kv_heads,
                impl=SimpleNamespace(scale=case.softmax_scale),
                kv_cache=cache,
            )
            for index, cache in zip(case.layers, self.pool.caches, strict=True)
        }
        self.path = TritonPath(context, spec, layers)
        self.front = BlockTableRow.NUM_HEADER
        num_columns = self.front + MAX_MODEL_LEN // case.block_size + case.num_state_blocks
        self.block_table = torch.zeros(max_rows, num_columns, dtype=torch.int32)
        self.query_start_loc = torch.zeros(max_rows + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32)
        self.positions = torch.zeros(max_rows, dtype=torch.int64)
        self.slot_mapping = torch.full((max_rows,), PAD_SLOT)

    def dummy_step(self, num_rows):
        """A dummy decode batch, as for a graph capture: its block table is all zeros."""
        self.block_table.zero_()
        self.positions.zero_()
        seq_lens = torch.ones(num_rows, dtype=torch.int32)
        return self._common(seq_lens, num_rows, np.arange(num_rows))

    def decode_step(self, num_rows):
        """One new token for every sequence of the pool, padded to ``num_rows`` rows."""
        table = self.pool.block_table
        self.block_table.zero_()
        self.block_table[: len(table), : table.shape[1]] = table
        self.positions.zero_()
        self.positions[: len(table)] = self.pool.positions
        return self._common(self.pool.positions + 1, num_rows, self.indices)

    def _common(self, seq_lens, num_rows, req_idx):
        """What runner V2 says of a decode step: as many tokens as rows, the last ones padding."""
        num_live = len(seq_lens)
        self.seq_lens.zero_()
        self.seq_lens[:num_live] = seq_lens
        self.query_start_loc.fill_(num_live)
        self.query_start_loc[: num_live + 1] = torch.arange(num_live + 1)
        self.slot_mapping.fill_(PAD_SLOT)
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc[: num_rows + 1],
            query_start_loc_cpu=self.query_start_loc[: num_rows + 1].clone(),
            seq_lens=self.seq_lens[:num_rows],
            seq_lens_cpu_upper_bound=self.seq_lens[:num_rows].clone(),
            num_reqs=num_rows,
            num_actual_tokens=num_rows,
            max_query_len=1,
            max_seq_len=MAX_MODEL_LEN,
            block_table_tensor=self.block_table[:num_rows],
            slot_mapping=self.slot_mapping[:num_rows],
            positions=self.positions[:num_rows],
            req_idx=req_idx,
        )

    def queries(self, num_tokens):
        sizes = (num_tokens, self.case.num_kv_heads * self.case.group_size, self.case.head_size)
        return torch.randn(sizes, generator=torch.Generator().manual_seed(1))

    def expected_slots(self):
        """Where the pool's sequences write their new tokens."""
        slots = []
        for row, sequence in enumerate(self.case.sequences):
            slot = sequence.position
            if slot >= sequence.first:
                slot = CONFIG.budget + (slot - sequence.first) % CONFIG.window
            block = int(self.block_table[row, self.front + slot // self.case.block_size])
            slots.append(block * self.case.block_size + slot % self.case.block_size)
        return slots

    def put_queries(self, caches, queries):
        """The queries of a decode step in the rings, one vector after the other."""
        for cache in caches:
            for row, sequence in enumerate(self.case.sequences):
                if sequence.position < sequence.first - CONFIG.window:
                    continue  # no eviction reads it
                for head, vector in enumerate(queries[row]):
                    kv_head, query_head = divmod(head, self.case.group_size)
                    entry = sequence.position % CONFIG.window
                    self.pool.ring_vector(cache, row, kv_head, entry, query_head)[:] = vector


def copies(caches):
    return [cache.clone() for cache in caches]


def assert_pages(caches, expected):
    """Every byte, NaN where there was NaN."""
    for cache, wanted in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


def addresses(step):
    """Where a CUDA graph that captured this step reads from."""
    ring = step.ring_write
    tensors = (step.seq_lens, step.block_table)
    tensors += (ring.positions, ring.query_start_loc, ring.seq_lens, ring.block_table)
    return [tensor.data_ptr() for tensor in tensors]


def check_block_table(worker, step):
    """Attention gets the blocks of what is cached, in rows that every backend can address.

    FlashInfer's XQA and trtllm-gen kernels take the pitch of the rows from the last dimension.
    """
    table, block_size = step.block_table, worker.case.block_size
    assert table.shape[0] == len(step.seq_lens)
    assert table.is_contiguous()
    assert table.shape[1] * table.element_size() % 128 == 0
    assert table.shape[1] * block_size >= MAX_MODEL_LEN
    for row, num_cached in enumerate(step.seq_lens.tolist()):
        num_blocks = -(-num_cached // block_size)
        own = worker.block_table[row, worker.front : worker.front + num_blocks]
        assert table[row, :num_blocks].tolist() == own.tolist()


DUE = (Sequence(FIRST, FIRST, 1), Sequence(FIRST, FIRST + 24, 2))
NOT_DUE = (Sequence(FIRST, 21, 3), Sequence(FIRST, FIRST + 19, 4))


def test_graphs_that_captured_an_eviction_once():
    """A capture evicts nothing and freezes nothing: replays show what later steps prepared."""
    worker = Worker(DUE + NOT_DUE)
    before = copies(worker.pool.caches)
    common = worker.dummy_step(6)
    captured = worker.path.prepare(common, capturing=True)
    queries = worker.queries(6)
    for cache in worker.pool.caches:
        captured.ring_write.store(cache, queries)
    assert_pages(worker.pool.caches, before)
    assert captured.max_seq_len == common.max_seq_len == MAX_MODEL_LEN
    assert worker.slot_mapping.tolist() == [PAD_SLOT] * 6
    assert worker.counters.as_dict()["evictions"] == 0
    at_capture = addresses(captured)
    check_block_table(worker, captured)

    expected, separated = worker.pool.expected()
    assert separated
    step = worker.path.prepare(worker.decode_step(6), capturing=False)
    assert worker.counters.as_dict()["evictions"] == len(DUE)
    assert_pages(worker.pool.caches, expected)
    assert addresses(step) == at_capture
    check_block_table(worker, step)
    assert captured.seq_lens.tolist() == [41, 41, 22, 44, 0, 0]
    assert step.seq_lens_cpu.tolist() == captured.seq_lens.tolist()
    assert step.max_seq_len == 44

    # The replay: what was captured runs again, over the step's queries.
    worker.put_queries(expected, queries)
    for cache in worker.pool.caches:
        captured.ring_write.store(cache, queries)
    assert_pages(worker.pool.caches, expected)


def test_graphs_that_captured_an_eviction_once_and_capture_between_steps():
    """A dummy step amid serving, as of an idle replica, leaves running sequences alone."""
    worker = Worker(DUE)
    expected, _ = worker.pool.expected()
    worker.path.prepare(worker.decode_step(2), capturing=False)
    worker.path.prepare(worker.dummy_step(4), capturing=True)
    assert_pages(worker.pool.caches, expected)
    assert worker.counters.as_dict()["evictions"] == len(DUE)


@pytest.mark.parametrize("num_rows", [4, 5, 6], ids="rows={}".format)
def test_padding_rows_of_a_graph_batch_evicting_or_writing_block_0(num_rows):
    """Rows and tokens of padding: every page but those of due sequences stays, block 0 too."""
    worker = Worker(DUE[:1] + NOT_DUE)
    expected, separated = worker.pool.expected()
    assert separated
    step = worker.path.prepare(worker.decode_step(num_rows), capturing=False)
    assert_pages(worker.pool.caches, expected)
    num_padding = num_rows - 3
    assert worker.slot_mapping[:3].tolist() == worker.expected_slots()
    assert worker.slot_mapping[3:].tolist() == [PAD_SLOT] * 3
    assert step.seq_lens.tolist() == [41, 22, 44] + [0] * num_padding
    check_block_table(worker, step)

    queries = worker.queries(num_rows)
    worker.put_queries(expected, queries)
    for cache in worker.pool.caches:
        step.ring_write.store(cache, queries)
        assert cache[0].isnan().all(), "block 0 was written"
    assert_pages(worker.pool.caches, expected)


def test_padding_rows_whose_stale_numbers_look_due():
    """A row with a header of 0 never evicts, whatever the host believes of it."""
    worker = Worker(DUE)
    for cache in worker.pool.caches:
        # Moves within block 0 would not show in NaN.
        cache[0] = torch.randn(cache[0].shape, generator=torch.Generator().manual_seed(2))
    before = copies(worker.pool.caches)
    common = worker.decode_step(4)
    worker.block_table.zero_()
    worker.path.prepare(common, capturing=False)
    assert_pages(worker.pool.caches, before)
    assert worker.slot_mapping.tolist() == [PAD_SLOT] * 6


@pytest.mark.parametrize("swap", [False, True], ids=["still", "swapped"])
def test_two_requests_that_swap_rows_between_steps(swap):
    """The step after a swap evicts from the request that is due, wherever its row is."""
    worker = Worker((DUE[0], NOT_DUE[0]))
    expected, _ = worker.pool.expected()
    common = worker.decode_step(2)
    if swap:
        order = [1, 0]
        worker.block_table[:2] = worker.block_table[order]
        worker.seq_lens[:2] = worker.seq_lens[order]
        worker.positions[:2] = worker.positions[order]
        common = common.replace(
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[order],
            req_idx=common.req_idx[order],
        )
    step = worker.path.prepare(common, capturing=False)
    assert_pages(worker.pool.caches, expected)
    assert step.seq_lens.tolist() == ([22, 41] if swap else [41, 22])


def test_a_policy_whose_tokens_take_numbers_along():
    """At a first eviction and at a later one; a sequence that is not due keeps what it has."""
    settings = {"policy": "distinct", "memory": 0.9, "budget": 40, "window": 8, "sinks": 4}
    worker = Worker(DUE + NOT_DUE, config=EvictionConfig.parse(settings))
    expected, separated = worker.pool.expected()
    assert separated
    worker.path.prepare(worker.decode_step(5), capturing=False)
    assert worker.counters.as_dict()["evictions"] == 2
    assert_numbers(worker.pool, expected)
    assert_pages(worker.pool.caches, expected)


def test_a_policy_that_gives_the_kernel_its_ranking():
    """The path asks the policy for the numbers of the rows that are due, and passes them on."""
    settings = {"policy": "streaming", "budget": 40, "window": 8, "sinks": 4}
    # At its first eviction a sequence's tokens lie in order: the expected ranking is their order.
    sequences = (DUE[0], NOT_DUE[0], Sequence(FIRST + 16, FIRST + 16, 5))
    worker = Worker(sequences, config=EvictionConfig.parse(settings))
    expected, separated = worker.pool.expected()
    assert separated
    worker.path.prepare(worker.decode_step(5), capturing=False)
    assert worker.counters.as_dict()["evictions"] == 2
    assert_pages(worker.pool.caches, expected)
