"""The wrapper around an attention backend: short sequences for it, evictions around it.

Attention runs unchanged over a cache that is short. Once per step, before the forward pass, the
metadata builder evicts from the sequences that are due and rewrites two tensors: where the new
tokens are written and how many tokens each sequence has cached. The implementation stores the
queries into the query ring on its way. RoPE positions, sampling and scheduling never notice.
"""

from typing import Any

import torch

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, replace_as

from vase_vllm.blocks import BlockTableRow, EvictionSpec
from vase_vllm.config import EvictionConfig
from vase_vllm.evictor import CPUEvictor, EvictionCounters, kv_head_indices
from vase_vllm.pages import cpu_page_layout
from vase_vllm.ring import RingLayout, RingWrite
from vase_vllm.schedule import EvictionSchedule
from vase_vllm.support import check_layers

_RING_WRITE = "eviction_ring_write"


class EvictionBuilderMixin(AttentionMetadataBuilder):
    """Evicts, and remaps what the wrapped builder sees."""

    counters: EvictionCounters

    def __init__(
        self,
        kv_cache_spec: EvictionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        config = EvictionConfig.from_vllm(vllm_config)
        assert config is not None, "this builder is made only where eviction is on"
        self._layers = {
            extract_layer_index(name): layer
            for name, layer in get_layers_from_vllm_config(
                vllm_config, Attention, layer_names
            ).items()
        }
        layer = next(iter(self._layers.values()))
        self.schedule = kv_cache_spec.schedule
        self.num_front = BlockTableRow.NUM_HEADER + kv_cache_spec.num_state_blocks
        self.ring = RingLayout(
            config.window, layer.num_heads // layer.num_kv_heads, kv_cache_spec.block_size
        )
        self.evictor = CPUEvictor(
            config.parameters,
            kv_cache_spec,
            self.ring,
            cpu_page_layout(
                layer.isa, kv_cache_spec.block_size, kv_cache_spec.head_size, kv_cache_spec.dtype
            ),
            layer.impl.scale,
            kv_head_indices(vllm_config, kv_cache_spec.num_kv_heads),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Evict from the due sequences, then build the wrapped backend's metadata.

        Dummy and padding rows have an all-zero block table, hence ``first == 0``: they neither
        evict nor write, in a CUDA graph capture as anywhere.
        """
        common = common_attn_metadata
        rows = common.block_table_tensor[: common.num_reqs]
        first = rows[:, BlockTableRow.FIRST].long()
        seq_lens = common.seq_lens[: common.num_reqs].long()
        self._evict(common, rows, first, seq_lens)

        token_rows, positions = self._tokens(common)
        self._remap_slots(common, rows, first, token_rows, positions)
        num_cached = self.schedule.slots(seq_lens - 1, first) + 1
        self.counters.num_cached = num_cached
        remapped = common.replace(
            seq_lens=num_cached.to(common.seq_lens.dtype),
            seq_lens_cpu_upper_bound=num_cached.to(common.seq_lens.dtype),
            max_seq_len=int(num_cached.max()),
            block_table_tensor=common.block_table_tensor[:, self.num_front :],
            # Caches of values that have changed with the lengths.
            _num_computed_tokens_cache=None,
        )
        metadata = super().build(common_prefix_len, remapped, fast_build, **kwargs)
        setattr(
            metadata,
            _RING_WRITE,
            RingWrite.plan(self.ring, rows, token_rows, positions, seq_lens),
        )
        return metadata

    def _evict(
        self,
        common: CommonAttentionMetadata,
        rows: torch.Tensor,
        first: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        query_lens = common.naive_query_lens()
        starts = seq_lens - query_lens
        due = self.schedule.due(starts, first) & (query_lens > 0)
        due_rows = due.nonzero().squeeze(-1)
        if not len(due_rows):
            return
        kv_caches = {index: layer.kv_cache for index, layer in self._layers.items()}
        for row, position in zip(due_rows.tolist(), starts[due_rows].tolist(), strict=True):
            num_tokens = self.evictor.evict(kv_caches, rows[row], position)
            self.counters.add(len(kv_caches), num_tokens)

    def _tokens(self, common: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of each token of the step, padding left out: both [T] int64."""
        num_tokens = int(common.query_start_loc_cpu[-1])
        assert common.positions is not None
        token_rows = torch.repeat_interleave(common.naive_query_lens(), output_size=num_tokens)
        return token_rows, common.positions[:num_tokens].long()

    def _remap_slots(
        self,
        common: CommonAttentionMetadata,
        rows: torch.Tensor,
        first: torch.Tensor,
        token_rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Rewrite where the step's tokens are written, in place.

        The forward context holds the same storage, which is what the cache write reads. Several
        builders may share it: the result depends on the positions and the block table alone.
        """
        block_size = self.ring.block_size
        token_first = first[token_rows]
        real = token_first > 0
        slots = self.schedule.slots(positions, token_first) * real
        blocks = rows[token_rows, self.num_front + slots // block_size]
        mapping = common.slot_mapping[: len(positions)]
        mapping.copy_(torch.where(real, blocks * block_size + slots % block_size, mapping))


class EvictionImplMixin(AttentionImpl):
    """Stores the queries of the step into the query ring."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The wrapped backend's forward pass. ``query``: [num_tokens, num_heads, head_size]."""
        # There is no metadata in profiling and warm-up runs.
        if attn_metadata is not None:
            getattr(attn_metadata, _RING_WRITE).store(kv_cache, query)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )


def wrap_layers(vllm_config: VllmConfig, config: EvictionConfig) -> EvictionCounters:
    """Put eviction around the attention backend of every full-attention layer.

    Called between loading the model and asking it for its KV cache specs. Layers with a sliding
    window or of another kind keep theirs.

    Returns:
        The counters that all wrapped layers share.

    Raises:
        UnsupportedError: a layer does something that eviction would break.
    """
    layers = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
        if layer.sliding_window is None
    }
    check_layers(layers, vllm_config.cache_config.block_size, config)
    counters = EvictionCounters(num_layers=len(layers))
    largest_group = max(layer.num_heads // layer.num_kv_heads for layer in layers.values())
    wrapped: dict[type[AttentionBackend], type[AttentionBackend]] = {}
    for layer in layers.values():
        backend = layer.attn_backend
        if backend not in wrapped:
            wrapped[backend] = _eviction_backend(backend, config, largest_group, counters)
        layer.attn_backend = wrapped[backend]
        # vLLM has built the implementation already, and its builders check its class: make the
        # object one of a subclass instead of wrapping it.
        implementation = type(layer.impl)
        layer.impl.__class__ = type(
            f"Eviction{implementation.__name__}", (EvictionImplMixin, implementation), {}
        )
    return counters


def _eviction_backend(
    backend: type[AttentionBackend],
    config: EvictionConfig,
    largest_group: int,
    counters: EvictionCounters,
) -> type[AttentionBackend]:
    """The backend with an evicting builder and an eviction spec. Its name stays the same."""
    builder = backend.get_builder_cls()
    eviction_builder = type(
        f"Eviction{builder.__name__}", (EvictionBuilderMixin, builder), {"counters": counters}
    )

    class EvictionBackend(backend):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_builder_cls() -> type[AttentionMetadataBuilder]:
            return eviction_builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> EvictionSpec:
            ring = RingLayout(config.window, largest_group, spec.block_size)
            return replace_as(
                super().customize_spec(spec),
                EvictionSpec,
                schedule=EvictionSchedule(config.budget, config.window),
                num_state_blocks=ring.num_blocks,
            )

    EvictionBackend.__name__ = EvictionBackend.__qualname__ = f"Eviction{backend.__name__}"
    return EvictionBackend
