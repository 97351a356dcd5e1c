"""One step's evictions and remapping on the CPU backend, in plain torch."""

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

        There are no graphs to capture on a CPU: ``capturing`` is never true.
        """
        rows = common.block_table_tensor[: common.num_reqs]
        first = rows[:, BlockTableRow.FIRST].long()
        seq_lens = common.seq_lens[: common.num_reqs].long()
        query_lens = common.naive_query_lens()
        self._evict(rows, first, seq_lens - query_lens, query_lens)

        num_tokens = int(common.query_start_loc_cpu[-1])
        assert common.positions is not None
        token_rows = torch.repeat_interleave(query_lens, output_size=num_tokens)
        positions = common.positions[:num_tokens].long()
        self._remap_slots(common.slot_mapping, rows, first, token_rows, positions)

        num_cached = self.spec.schedule.slots(seq_lens - 1, first) + 1
        self.counters.num_cached = num_cached
        num_cached = num_cached.to(common.seq_lens.dtype)
        return PreparedStep(
            seq_lens=num_cached,
            seq_lens_cpu=num_cached,
            max_seq_len=int(num_cached.max()),
            block_table=common.block_table_tensor[:, self.spec.num_front :],
            ring_write=RingWrite.plan(self.ring, rows, token_rows, positions, seq_lens),
        )

    def _evict(
        self,
        rows: torch.Tensor,
        first: torch.Tensor,
        starts: torch.Tensor,
        query_lens: torch.Tensor,
    ) -> None:
        due = self.spec.schedule.due(starts, first) & (query_lens > 0)
        due_rows = due.nonzero().squeeze(-1)
        if not len(due_rows):
            return
        kv_caches = {index: layer.kv_cache for index, layer in self.layers.items()}
        for row, position in zip(due_rows.tolist(), starts[due_rows].tolist(), strict=True):
            num_tokens = self.evictor.evict(kv_caches, rows[row], position)
            self.counters.add(len(kv_caches), num_tokens)

    def _remap_slots(
        self,
        slot_mapping: torch.Tensor,
        rows: torch.Tensor,
        first: torch.Tensor,
        token_rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        block_size = self.spec.block_size
        token_first = first[token_rows]
        real = token_first > 0
        slots = self.spec.schedule.slots(positions, token_first) * real
        blocks = rows[token_rows, self.spec.num_front + slots // block_size]
        mapping = slot_mapping[: len(positions)]
        mapping.copy_(torch.where(real, blocks * block_size + slots % block_size, mapping))
