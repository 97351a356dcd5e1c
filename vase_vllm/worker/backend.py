"""The wrapper around an attention backend, which evicts and shows it shorter sequences.

Attention runs unchanged over a cache that is short. Once per step, before the forward pass, the
metadata builder evicts from the sequences that are due and rewrites two tensors: where the new
tokens are written and how many tokens each sequence has cached. The implementation stores the
queries in the query ring before it attends. RoPE positions, sampling and scheduling do not change.
"""

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.errors import EvictionError
from vase_vllm.support import check_layers
from vase_vllm.worker.object_patches import attach_ring_write, mix_into, ring_write_of
from vase_vllm.worker.step import PathFactory, StepContext


def _cpu_path(*args: Any) -> Any:
    from vase_vllm.worker.cpu_path import CPUPath

    return CPUPath(*args)


def _triton_path(*args: Any) -> Any:
    from vase_vllm.worker.triton_path import TritonPath

    return TritonPath(*args)


PATHS: dict[str, PathFactory] = {
    "CPU_ATTN": _cpu_path,
    "FLASH_ATTN": _triton_path,
    "FLASHINFER": _triton_path,
    "TRITON_ATTN": _triton_path,
}
"""Attention backends that eviction supports, and the path of each."""


class EvictionBuilderMixin(AttentionMetadataBuilder):
    """Evicts, and remaps what the wrapped builder sees."""

    context: StepContext
    path_factory: PathFactory
    supports_update_block_table = False
    """Else vLLM builds once for several KV cache groups, and gives the others their own block
    tables past :meth:`build`: with our columns in front, and nothing evicted or remapped."""

    def __init__(
        self,
        kv_cache_spec: EvictionSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        block_size = vllm_config.cache_config.block_size
        if kv_cache_spec.block_size != block_size:
            raise EvictionError(
                f"--kv-eviction: the attention backend splits blocks of --block-size {block_size} "
                f"into blocks of {kv_cache_spec.block_size}; set --block-size "
                f"{kv_cache_spec.block_size}"
            )
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        by_index = {extract_layer_index(name): layer for name, layer in layers.items()}
        self._path = type(self).path_factory(self.context, kv_cache_spec, by_index)
        self.context.paths.append(self._path)
        self._capturing = False

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Build for a capture; the wrapped backend's own method calls :meth:`build`."""
        self._capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._capturing = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Evict from the due sequences, then build the wrapped backend's metadata."""
        step = self._path.prepare(common_attn_metadata, self._capturing)
        remapped = common_attn_metadata.replace(
            seq_lens=step.seq_lens,
            seq_lens_cpu_upper_bound=step.seq_lens_cpu,
            max_seq_len=step.max_seq_len,
            block_table_tensor=step.block_table,
            # A cache of values that have changed with the lengths.
            _num_computed_tokens_cache=None,
        )
        metadata = super().build(common_prefix_len, remapped, fast_build, **kwargs)
        attach_ring_write(metadata, step.ring_write)
        return metadata


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
            ring_write = ring_write_of(attn_metadata)
            if ring_write is not None:
                ring_write.store(kv_cache, query)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)


def full_attention_layers(vllm_config: Any) -> dict[str, Attention]:
    """The layers that evict, by name: those whose KV cache spec is plainly full attention.

    Sliding-window layers, and layers without a KV cache, stay as they are.

    Raises:
        EvictionError: a layer's KV cache is of another kind, whose slots eviction does not know.
    """
    found = {}
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items():
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is None or type(spec) is SlidingWindowSpec:
            continue
        if type(spec) not in (FullAttentionSpec, EvictionSpec):
            kind = type(spec).__name__.removesuffix("Spec")
            raise EvictionError(
                f"--kv-eviction: layer {name} has a KV cache of the kind {kind}, which is not "
                "supported; remove --kv-eviction"
            )
        found[name] = layer
    return found


def wrap_layers(context: StepContext) -> None:
    """Put eviction around the attention backend of every full-attention layer.

    Called between loading the model and asking it for its KV cache specs. It takes the memory that
    evictions work in, before vLLM measures what is left for the KV cache.

    Raises:
        EvictionError: a layer does something that eviction would break.
    """
    vllm_config = context.vllm_config
    layers = full_attention_layers(vllm_config)
    check_layers(layers, vllm_config.cache_config.block_size, context.config, tuple(PATHS))
    check_kernels(layers, vllm_config.cache_config.block_size, context.config)
    if on_gpu := _on_gpu(layers):
        from vase_vllm.worker.triton_path import scratch_memory

        context.runs_in_triton = True
        context.scratch = scratch_memory(context, on_gpu.values())
    largest_group = max(layer.num_heads // layer.num_kv_heads for layer in layers.values())
    wrapped: dict[type[AttentionBackend], type[AttentionBackend]] = {}
    for layer in layers.values():
        backend = layer.attn_backend
        if backend not in wrapped:
            wrapped[backend] = _eviction_backend(backend, context, largest_group)
        layer.attn_backend = wrapped[backend]
        mix_into(layer.impl, EvictionImplMixin)


def _on_gpu(layers: dict[str, Attention]) -> dict[str, Attention]:
    """The layers whose evictions run in Triton."""
    return {n: x for n, x in layers.items() if PATHS[x.attn_backend.get_name()] is _triton_path}


def check_kernels(layers: dict[str, Attention], block_size: int, config: EvictionConfig) -> None:
    """Refuse what the kernels cannot take, where it is they that evict and store queries.

    Raises:
        EvictionError: names the layer or the setting, and what to change.
    """
    on_gpu = _on_gpu(layers)
    if not on_gpu:
        return
    from vase_vllm.kernels.checks import BLOCK_SIZES, misfit

    if block_size not in BLOCK_SIZES:
        raise EvictionError(
            f"--kv-eviction {config.policy.name}: the GPU kernels do not take --block-size "
            f"{block_size}; set --block-size to one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    for name, layer in on_gpu.items():
        if reason := misfit(layer.head_size, layer.num_heads // layer.num_kv_heads):
            raise EvictionError(
                f"--kv-eviction {config.policy.name}: the GPU kernels do not take layer {name}: "
                f"{reason}; remove --kv-eviction"
            )


def _eviction_backend(
    backend: type[AttentionBackend], context: StepContext, largest_group: int
) -> type[AttentionBackend]:
    """The backend with an evicting builder and an eviction spec. Its name stays the same."""
    config = context.config
    builder = backend.get_builder_cls()
    eviction_builder = type(
        f"Eviction{builder.__name__}",
        (EvictionBuilderMixin, builder),
        {"context": context, "path_factory": PATHS[backend.get_name()]},
    )

    class EvictionBackend(backend):
        @staticmethod
        def get_builder_cls() -> type[AttentionMetadataBuilder]:
            return eviction_builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> EvictionSpec:
            return replace_as(
                super().customize_spec(spec),
                EvictionSpec,
                schedule=config.schedule,
                num_state_blocks=config.num_state_blocks(
                    largest_group, spec.block_size, spec.head_size, spec.dtype
                ),
            )

    EvictionBackend.__name__ = EvictionBackend.__qualname__ = f"Eviction{backend.__name__}"
    return EvictionBackend
