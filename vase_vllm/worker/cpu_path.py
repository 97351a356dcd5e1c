"""One step's evictions and remapping on the CPU backend, in plain torch."""

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
        self._no_write = TorchRingWrite.nothing(self.ring)

    def prepare(self, common: CommonAttentionMetadata, capturing: bool) -> PreparedStep:
        """Evict from the due sequences, rewrite the slot mapping in place, find the lengths.

        There are no graphs to capture on a CPU: ``capturing`` is never true. The arrays are small
        and there are many steps: numpy, on the tensors' own memory, takes a third of torch's time,
        and so does a slice of its.
        """
        assert common.positions is not None
        num_rows, block_table = common.num_reqs, common.block_table_tensor
        rows = block_table.numpy()[:num_rows]
        first = rows[:, BlockTableRow.FIRST].astype(np.int64)
        seq_lens = common.seq_lens.numpy()[:num_rows].astype(np.int64)
        query_starts = common.query_start_loc_cpu.numpy()[: num_rows + 1]
        query_lens = query_starts[1:] - query_starts[:-1]
        token_rows = np.repeat(np.arange(num_rows), query_lens)
        positions = common.positions.numpy()[: len(token_rows)]
        slot_mapping = common.slot_mapping.numpy()
        if (seq_lens <= self.spec.schedule.first_query(first)).all():
            # No eviction is near: tokens lie in the slots of their positions, no query is stored.
            self._write_slots(slot_mapping, rows, token_rows, positions)
            num_cached = seq_lens
            ring_write = self._no_write
        else:
            self._evict(block_table, first, seq_lens - query_lens, query_lens)
            token_first = first[token_rows]
            budget = rows[:, BlockTableRow.BUDGET].astype(np.int64)
            slots = self.spec.schedule.slots(positions, token_first, budget[token_rows])
            self._write_slots(slot_mapping, rows, token_rows, slots, token_first > 0)
            num_cached = self.spec.schedule.slots(seq_lens - 1, first, budget) + 1
            ring_write = TorchRingWrite.plan(self.ring, rows, token_rows, positions, seq_lens)

        self.context.counters.num_cached = num_cached
        lengths = torch.from_numpy(num_cached.astype(np.int32))
        return PreparedStep(
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            max_seq_len=int(num_cached.max()),
            block_table=block_table[:, BlockTableRow.NUM_HEADER :],
            ring_write=ring_write,
        )

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
        kv_caches = {index: layer.kv_cache for index, layer in self.layers.items()}
        for row, position in zip(due_rows.tolist(), starts[due_rows].tolist(), strict=True):
            own = block_table[row]
            header = RowHeader(*own[: BlockTableRow.NUM_HEADER].tolist())
            num_tokens = self.evictor.evict(kv_caches, own, header, position, self.context.observer)
            self.context.counters.add(len(kv_caches), num_tokens)

    def _write_slots(
        self,
        slot_mapping: np.ndarray,
        rows: np.ndarray,
        token_rows: np.ndarray,
        slots: np.ndarray,
        real: np.ndarray | bool = True,
    ) -> None:
        """Say where in the cache the step's tokens go; padding tokens, not ``real``, go nowhere."""
        block_size = self.spec.block_size
        block, cell = np.divmod(slots * real, block_size)
        blocks = rows[token_rows, BlockTableRow.NUM_HEADER + block].astype(np.int64)
        np.copyto(slot_mapping[: len(slots)], blocks * block_size + cell, where=real)
