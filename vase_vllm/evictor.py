"""One sequence's eviction over the layers of one metadata builder, on the CPU backend's pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv

from vase_vllm.blocks import BlockTableRow, EvictionSpec
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.reference import (
    attention_scores,
    plan_moves,
    sampling_noise,
    select_survivors,
    value_range,
)
from vase_vllm.pages import PageLayout
from vase_vllm.ring import RingLayout

_DRAWS_TOGETHER = 1 << 15
"""Noise drawn at once: int64 numbers that still fit a processor's cache."""


@dataclass
class EvictionCounters:
    """What one worker has evicted since it started.

    Several builders count into it, each for its own layers; a sequence evicts from all of them.
    """

    num_layers: int
    # [sequences] tokens cached by each sequence of the latest step; summed only when asked for.
    num_cached: torch.Tensor | None = None
    _layer_evictions: int = 0
    _layer_tokens: int = 0

    def add(self, num_layers: int, num_tokens: int) -> None:
        """Count one sequence's eviction of ``num_tokens`` per KV head from ``num_layers``."""
        self._layer_evictions += num_layers
        self._layer_tokens += num_layers * num_tokens

    def as_dict(self) -> dict[str, int]:
        """Evictions of sequences, and tokens per layer and KV head: dropped so far, and cached.

        ``cached_tokens`` is that of the latest step, over all its sequences.
        """
        return {
            "evictions": self._layer_evictions // self.num_layers,
            "evicted_tokens": self._layer_tokens // self.num_layers,
            "cached_tokens": 0 if self.num_cached is None else int(self.num_cached.sum()),
        }


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 matrix products of bf16 numbers run on the processor's bf16 units.

    A product of two bf16 numbers is exact in fp32, and oneDNN adds up in fp32: the result is that
    of the fp32 units, in half the time.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class CPUEvictor:
    """Evictions in plain torch, straight on the CPU backend's pages."""

    def __init__(
        self,
        parameters: EvictionParameters,
        spec: EvictionSpec,
        ring: RingLayout,
        page_layout: PageLayout,
        scale: float,
        kv_heads: torch.Tensor,
    ) -> None:
        """Prepare for layers that share one builder, hence all of the following.

        Args:
            scale: what the attention backend multiplies its logits with.
            kv_heads: [H] int64, indices of this rank's KV heads in the whole model.
        """
        self.parameters = parameters
        self.spec = spec
        self.ring = ring
        self.page_layout = page_layout
        self.scale = scale / parameters.temperature
        self.kv_heads = kv_heads

    def evict(self, kv_caches: dict[int, torch.Tensor], row: torch.Tensor, position: int) -> int:
        """Evict from one sequence that is due, in place.

        Args:
            kv_caches: layer index to [num_blocks, H, block_size, 2 * D], packed.
            row: [columns] int32, the sequence's whole block-table row.
            position: the position that the sequence's next step starts at.

        Returns:
            Tokens dropped per KV head.
        """
        first, key = row[: BlockTableRow.NUM_HEADER].tolist()
        num_cached = self.spec.schedule.num_cached(position, first)
        eviction_index = (position - first) // self.parameters.window
        front = self.spec.num_front
        # Layers with fewer query heads than the largest use fewer of the state blocks.
        state_end = BlockTableRow.NUM_HEADER + self.ring.num_blocks
        state_blocks = row[BlockTableRow.NUM_HEADER : state_end].long()
        blocks = row[front : front + cdiv(num_cached, self.spec.block_size)].long()
        noises = self._noise(
            list(kv_caches), num_cached - self.parameters.window, eviction_index, key
        )
        for kv_cache, noise in zip(kv_caches.values(), noises, strict=True):
            queries = self.ring.load(kv_cache, state_blocks)
            self._evict_layer(kv_cache, blocks, num_cached, queries, noise)
        return num_cached - self.parameters.budget

    def _noise(
        self, layers: list[int], num_candidates: int, eviction_index: int, key: int
    ) -> Iterator[torch.Tensor | None]:
        """Each layer's noise, [H, candidates], or None for the deterministic top-k.

        A draw is some hundred small operations: layers draw together as long as they are small.
        """
        if self.parameters.sampling != "gumbel":
            yield from [None] * len(layers)
            return
        num_heads = len(self.kv_heads)
        num_together = max(1, _DRAWS_TOGETHER // (num_heads * num_candidates))
        for start in range(0, len(layers), num_together):
            together = torch.tensor(layers[start : start + num_together])
            # The counter of layer l and head h is that of layer 0 and head l * 65536 + h.
            heads = (together[:, None] * 65536 + self.kv_heads).flatten()
            noise = sampling_noise(self.parameters, num_candidates, eviction_index, 0, heads, key)
            yield from noise.split(num_heads)

    def _read(
        self, key_pages: torch.Tensor, value_pages: torch.Tensor, blocks: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and value ranges in slot order: [H, D, slots] and [H, slots], fp32.

        Block by block: several times faster than gathering the packed pages first.
        """
        spec = self.spec
        shape = (spec.num_kv_heads, spec.head_size, len(blocks), spec.block_size)
        keys = torch.empty(shape)
        ranges = torch.empty(spec.num_kv_heads, len(blocks), spec.block_size)
        for index, block in enumerate(blocks):
            keys[:, :, index] = self.page_layout.keys.unpack(key_pages[block]).transpose(-1, -2)
            ranges[:, index] = value_range(self.page_layout.values.unpack(value_pages[block]))
        return keys.flatten(2), ranges.flatten(1)

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
        keys, ranges = self._read(key_pages, value_pages, blocks.tolist())
        with _exact_products(kv_cache.dtype):
            scores = attention_scores(
                queries.float(), keys[..., :num_candidates], self.scale, parameters.smoothing
            )
        ranges = ranges[:, :num_candidates]
        keep = select_survivors(parameters, scores, ranges, noise)
        head, source, destination = plan_moves(parameters, keep)
        block_size = self.spec.block_size
        source_at = blocks[source // block_size], source % block_size
        destination_at = blocks[destination // block_size], destination % block_size
        self.page_layout.keys.copy(key_pages, head, source_at, destination_at)
        self.page_layout.values.copy(value_pages, head, source_at, destination_at)
