"""One step's evictions and remapping on the CPU backend, in plain torch."""

import time

import numpy as np
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.pages import cpu_page_layout
from vase_vllm.worker.query_ring import TorchRingWrite
from vase_vllm.worker.step import PreparedStep, StepContext


class CPUPath:
    """Everything is on the host: the block table is read where it lies."""

    def __init__(self, context: StepContext, spec: EvictionSpec, layers: dict[int, Attention]):
        layer = next(iter(layers.values()))
        self.spec = spec
        self.layers = layers
        self.context = context
        self.ring = RingLayout(
            context.config.window, layer.num_heads // layer.num_kv_heads, spec.block_size
        )
        self.page_layout = cpu_page_layout(layer.isa, spec.block_size, spec.head_size, spec.dtype)
        self.evictor = TorchEvictor(
            context.config,
            spec,
            self.ring,
            self.page_layout,
            layer.impl.scale,
            context.kv_heads(spec.num_kv_heads),
        )
        most_rows = context.vllm_config.scheduler_config.max_num_seqs
        self._all_rows = np.arange(most_rows)
        self._one_each = np.ones(most_rows, dtype=np.int64)

    def prepare(self, common: CommonAttentionMetadata, capturing: bool) -> PreparedStep:
        """Evict from the due sequences, rewrite the slot mapping in place, find the lengths.

        There are no graphs to capture on a CPU: ``capturing`` is never true. The arrays are small,
        there are many steps, and what the model has just read has pushed our code out of the
        processor's caches: what counts is the number of calls, and numpy's, on the tensors' own
        memory, take a third of torch's time.
        """
        assert common.positions is not None
        num_rows, block_table = common.num_reqs, common.block_table_tensor
        rows = block_table.numpy()[:num_rows]
        first, seq_lens = rows[:, BlockTableRow.FIRST], common.seq_lens.numpy()[:num_rows]
        query_lens, token_rows = self._rows_of_tokens(common)
        positions = common.positions.numpy()[: len(token_rows)]
        slot_mapping = common.slot_mapping.numpy()
        if (seq_lens <= self.spec.schedule.first_query(first)).all():
            # No eviction is near: tokens lie in the slots of their positions, no query is stored.
            self._write_slots(slot_mapping, rows, token_rows, positions)
            num_cached, lengths, longest = seq_lens, common.seq_lens, common.max_seq_len
            ring_write = None
        else:
            first, seq_lens = first.astype(np.int64), seq_lens.astype(np.int64)
            self._evict(block_table, first, seq_lens - query_lens, query_lens)
            token_first = first[token_rows]
            budget = rows[:, BlockTableRow.BUDGET].astype(np.int64)
            slots = self.spec.schedule.slots(positions, token_first, budget[token_rows])
            real = token_first > 0
            self._write_slots(slot_mapping, rows, token_rows, slots * real, real)
            num_cached = self.spec.schedule.slots(seq_lens - 1, first, budget) + 1
            lengths = torch.from_numpy(num_cached.astype(np.int32))
            longest = int(num_cached.max())
            ring_write = TorchRingWrite.plan(self.ring, rows, token_rows, positions, seq_lens)

        self.context.counters.num_cached = num_cached
        return PreparedStep(
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            max_seq_len=longest,
            block_table=block_table[:, BlockTableRow.NUM_HEADER :],
            ring_write=ring_write,
        )

    def _rows_of_tokens(self, common: CommonAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each row in this step: [R], and the row of each: [T]."""
        num_rows = common.num_reqs
        all_rows = self._all_rows[:num_rows]
        if common.max_query_len == 1 and common.num_actual_tokens == num_rows:
            return self._one_each[:num_rows], all_rows
        starts = common.query_start_loc_cpu.numpy()
        query_lens = starts[1 : num_rows + 1] - starts[:num_rows]
        return query_lens, np.repeat(all_rows, query_lens)

    def _evict(
        self,
        block_table: torch.Tensor,
        first: np.ndarray,
        starts: np.ndarray,
        query_lens: np.ndarray,
    ) -> None:
        due_rows = np.flatnonzero(self.spec.schedule.due(starts, first) & (query_lens > 0))
        if not len(due_rows):
            return
        start = time.perf_counter()
        kv_caches = {index: layer.kv_cache for index, layer in self.layers.items()}
        for row, position in zip(due_rows.tolist(), starts[due_rows].tolist(), strict=True):
            own = block_table[row]
            header = RowHeader(*own[: BlockTableRow.NUM_HEADER].tolist())
            num_tokens = self.evictor.evict(kv_caches, own, header, position, self.context.observer)
            self.context.counters.add(len(kv_caches), num_tokens)
        self.context.counters.seconds += time.perf_counter() - start

    def _write_slots(
        self,
        slot_mapping: np.ndarray,
        rows: np.ndarray,
        token_rows: np.ndarray,
        slots: np.ndarray,
        real: np.ndarray | bool = True,
    ) -> None:
        """Say where in the cache the step's tokens go; padding tokens, not ``real``, go nowhere.

        Args:
            token_rows: [T] int64 row of each token.
            slots: [T] int64 of each token within its sequence; of padding tokens 0.
        """
        block_size = self.spec.block_size
        column = slots // block_size
        offset = rows[token_rows, BlockTableRow.NUM_HEADER + column] - column
        np.copyto(slot_mapping[: len(slots)], offset * block_size + slots, where=real)
