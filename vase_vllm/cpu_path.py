"""One step's evictions and remapping on the CPU backend, in plain torch."""

import numpy as np
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from vase_vllm.block_table_row import BlockTableRow
from vase_vllm.blocks import EvictionSpec
from vase_vllm.evictor import TorchEvictor
from vase_vllm.pages import cpu_page_layout
from vase_vllm.ring import RingLayout, RingWrite
from vase_vllm.step import PreparedStep, StepContext


class CPUPath:
    """Everything is on the host: the block table is read where it lies."""

    def __init__(self, context: StepContext, spec: EvictionSpec, layers: dict[int, Attention]):
        layer = next(iter(layers.values()))
        self.spec = spec
        self.layers = layers
        self.counters = context.counters
        self.ring = RingLayout(
            context.config.window, layer.num_heads // layer.num_kv_heads, spec.block_size
        )
        self.evictor = TorchEvictor(
            context.config,
            spec,
            self.ring,
            cpu_page_layout(layer.isa, spec.block_size, spec.head_size, spec.dtype),
            layer.impl.scale,
            context.kv_heads(spec.num_kv_heads),
        )

    def prepare(self, common: CommonAttentionMetadata, capturing: bool) -> PreparedStep:
        """Evict from the due sequences, rewrite the slot mapping in place, find the lengths.

        There are no graphs to capture on a CPU: ``capturing`` is never true. The arrays are small
        and there are many steps: numpy, on the tensors' own memory, takes a third of torch's time.
        """
        assert common.positions is not None
        rows = common.block_table_tensor[: common.num_reqs].numpy()
        first = rows[:, BlockTableRow.FIRST].astype(np.int64)
        seq_lens = common.seq_lens[: common.num_reqs].numpy().astype(np.int64)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy()
        query_lens = np.diff(starts)
        self._evict(common.block_table_tensor, first, seq_lens - query_lens, query_lens)

        token_rows = np.repeat(np.arange(common.num_reqs), query_lens)
        positions = common.positions[: len(token_rows)].numpy()
        self._remap_slots(common.slot_mapping.numpy(), rows, first, token_rows, positions)

        num_cached = self.spec.schedule.slots(seq_lens - 1, first) + 1
        self.counters.num_cached = num_cached
        lengths = torch.from_numpy(num_cached).to(common.seq_lens.dtype)
        return PreparedStep(
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            max_seq_len=int(num_cached.max()),
            block_table=common.block_table_tensor[:, self.spec.num_front :],
            ring_write=RingWrite.plan(self.ring, rows, token_rows, positions, seq_lens),
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
            num_tokens = self.evictor.evict(kv_caches, block_table[row], position)
            self.counters.add(len(kv_caches), num_tokens)

    def _remap_slots(
        self,
        slot_mapping: np.ndarray,
        rows: np.ndarray,
        first: np.ndarray,
        token_rows: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        block_size = self.spec.block_size
        token_first = first[token_rows]
        real = token_first > 0
        slots = self.spec.schedule.slots(positions, token_first) * real
        block, cell = np.divmod(slots, block_size)
        blocks = rows[token_rows, self.spec.num_front + block].astype(np.int64)
        np.copyto(slot_mapping[: len(positions)], blocks * block_size + cell, where=real)
