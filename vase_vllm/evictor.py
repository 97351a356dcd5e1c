"""Runs the evictions of one step: due sequences times the layers of one metadata builder."""

from dataclasses import dataclass

import torch

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv

from vase_vllm.blocks import BlockTableRow, EvictionSpec
from vase_vllm.config import EvictionConfig
from vase_vllm.kernels.reference import (
    attention_scores,
    plan_moves,
    sampling_noise,
    select_survivors,
    value_range,
)
from vase_vllm.pages import PageLayout, cpu_page_layout
from vase_vllm.ring import RingLayout


@dataclass
class EvictionCounters:
    """What has been evicted since the engine started, per worker.

    Attributes:
        evictions: evictions of whole sequences (all layers and heads count as one).
        evicted_tokens: tokens dropped by them, per KV head.
    """

    evictions: int = 0
    evicted_tokens: int = 0


def kv_head_indices(vllm_config: VllmConfig, num_local_heads: int) -> torch.Tensor:
    """Indices in the whole model of this rank's KV heads: [num_local_heads] int64.

    vLLM shards the heads over tensor-parallel ranks, or replicates them if there are fewer heads
    than ranks. Draws keyed by these indices do not depend on the degree of parallelism.
    """
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    num_heads = vllm_config.model_config.get_total_num_kv_heads()
    start = rank * num_heads // world_size
    return torch.arange(start, start + num_local_heads)


class CPUEvictor:
    """Evictions in plain torch, straight on the CPU backend's pages."""

    def __init__(
        self,
        config: EvictionConfig,
        spec: EvictionSpec,
        ring: RingLayout,
        layers: dict[str, Attention],
        vllm_config: VllmConfig,
        counters: EvictionCounters,
    ) -> None:
        """Prepare for the layers that share one builder.

        Args:
            layers: layer name to layer; all have the same heads, head size and dtype.
        """
        self.parameters = config.parameters
        self.spec = spec
        self.ring = ring
        self.layers = [(extract_layer_index(name), layer) for name, layer in layers.items()]
        layer = self.layers[0][1]
        self.scale = layer.impl.scale / config.temperature
        self.kv_heads = kv_head_indices(vllm_config, spec.num_kv_heads)
        self.page_layout: PageLayout = cpu_page_layout(
            layer.isa, spec.block_size, spec.head_size, spec.dtype
        )
        self.counters = counters

    def evict(self, block_table: torch.Tensor, rows: list[int], positions: list[int]) -> None:
        """Evict from due sequences, in place.

        Args:
            block_table: [R, columns] int32, whole rows.
            rows: the rows that are due.
            positions: for each, the position that its next step starts at.
        """
        for row, position in zip(rows, positions, strict=True):
            self._evict_sequence(block_table[row], position)

    def _evict_sequence(self, row: torch.Tensor, position: int) -> None:
        first, key = row[: BlockTableRow.NUM_HEADER].tolist()
        num_cached = self.spec.schedule.num_cached(position, first)
        eviction_index = (position - first) // self.parameters.window
        front = BlockTableRow.NUM_HEADER + self.spec.num_state_blocks
        # Layers with fewer query heads than the largest use fewer of the state blocks.
        state_end = BlockTableRow.NUM_HEADER + self.ring.num_blocks
        state_blocks = row[BlockTableRow.NUM_HEADER : state_end].long()
        blocks = row[front : front + cdiv(num_cached, self.spec.block_size)].long()
        for layer_index, layer in self.layers:
            queries = self.ring.load(layer.kv_cache, state_blocks)
            noise = None
            if self.parameters.sampling == "gumbel":
                noise = sampling_noise(
                    self.parameters,
                    num_cached - self.parameters.window,
                    eviction_index,
                    layer_index,
                    self.kv_heads,
                    key,
                )
            self._evict_layer(layer.kv_cache, blocks, num_cached, queries, noise)
        self.counters.evictions += 1
        self.counters.evicted_tokens += num_cached - self.parameters.budget

    def _evict_layer(
        self,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        num_cached: int,
        queries: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> None:
        """One sequence, one layer, all its KV heads.

        Args:
            kv_cache: [num_blocks, H, block_size, 2 * D], packed, changed in place.
            blocks: [n] int64, the blocks of the sequence's slots.
            queries: [H, W * G, D].
            noise: [H, candidates] fp32, or None for the deterministic top-k.
        """
        parameters = self.parameters
        num_candidates = num_cached - parameters.window
        key_pages, value_pages = self.page_layout.split(kv_cache)
        # [n, H, block_size, D] -> [H, D, slots] in fp32, as one copy.
        keys = self.page_layout.keys.unpack(key_pages[blocks])
        keys = keys.permute(1, 3, 0, 2).float().flatten(2)
        scores = attention_scores(
            queries.float(), keys[..., :num_candidates], self.scale, parameters.smoothing
        )
        values = self.page_layout.values.unpack(value_pages[blocks])
        ranges = value_range(values).transpose(0, 1).flatten(1)[:, :num_candidates]
        keep = select_survivors(parameters, scores, ranges, noise)
        head, source, destination = plan_moves(parameters, keep)
        block_size = self.spec.block_size
        source_at = blocks[source // block_size], source % block_size
        destination_at = blocks[destination // block_size], destination % block_size
        self.page_layout.keys.copy(key_pages, head, source_at, destination_at)
        self.page_layout.values.copy(value_pages, head, source_at, destination_at)
