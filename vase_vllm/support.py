"""What eviction does not work with, refused at start-up: one line, the setting and the remedy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.policies.base import AttentionShape

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


def check_engine(vllm_config: VllmConfig, config: EvictionConfig) -> None:
    """Refuse an engine that eviction cannot serve exactly as asked.

    Raises:
        EvictionError: names the setting and what to change.
    """
    if reason := next(_engine_reasons(vllm_config, config), None):
        raise EvictionError(f"--kv-eviction {config.policy.name}: {reason}")


def _engine_reasons(vllm_config: VllmConfig, config: EvictionConfig) -> Iterator[str]:
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield f"platform {current_platform.device_name} is not supported; remove --kv-eviction"
    if model.runner_type != "generate":
        yield f"{model.runner_type} models do not decode; remove --kv-eviction"
    if model.use_mla:
        yield "models with multi-head latent attention (MLA) are unsupported; remove --kv-eviction"
    if model.is_encoder_decoder:
        yield "encoder-decoder models are not supported; remove --kv-eviction"
    if model.is_attention_free or model.is_hybrid:
        yield (
            "models with state-space or linear-attention layers are not supported; "
            "remove --kv-eviction"
        )
    if model.is_diffusion:
        yield "diffusion models are not supported; remove --kv-eviction"
    if model.is_mm_prefix_lm or model.rswa_window is not None:
        yield "models whose prompt stays visible for ever are not supported; remove --kv-eviction"
    if parallel.decode_context_parallel_size > 1:
        yield "decode context parallelism is not supported; remove --decode-context-parallel-size"
    if parallel.prefill_context_parallel_size > 1:
        yield "prefill context parallelism is not supported; remove --prefill-context-parallel-size"
    if parallel.enable_dbo:
        yield "dual batch overlap is not supported; remove --enable-dbo"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported; remove --speculative-config"
    if cache.kv_offloading_size is not None:
        yield "KV cache offloading is not supported; remove --kv-offloading-size"
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors are not supported; remove --kv-transfer-config"
    if is_quantized_kv_cache(cache.cache_dtype):
        yield (
            f"a quantized KV cache ({cache.cache_dtype}) is not supported; "
            "set --kv-cache-dtype auto"
        )
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        yield (
            f"a KV cache of {cache.cache_dtype} beside a model of {model.dtype} is not supported; "
            "set --kv-cache-dtype auto"
        )
    if reason := config.schedule.why_nothing_evicts(
        model.max_model_len, "--kv-eviction-config.budget"
    ):
        yield reason
    try:
        config.policy.check_model(attention_shape(model))
    except ValueError as error:
        yield str(error)


def attention_shape(model: ModelConfig) -> AttentionShape:
    """The shape of a model's attention, before it is distributed over devices."""
    return AttentionShape(
        num_layers=model.get_total_num_hidden_layers(),
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
    )


def check_pool(config: EvictionConfig, num_bytes: int, num_required: int) -> None:
    """Refuse a KV cache that cannot hold one sequence.

    Args:
        num_bytes: memory for the KV cache of one worker.
        num_required: bytes of one sequence at its bound, over the worker's layers.

    Raises:
        EvictionError: names the setting and what to change.
    """
    if num_required > num_bytes:
        raise EvictionError(
            f"--kv-eviction-config.budget ({config.budget}) + window ({config.window}) tokens need "
            f"{num_required / 2**20:.1f} MiB of KV cache for one sequence, and there are "
            f"{num_bytes / 2**20:.1f} MiB: lower budget, or raise --kv-cache-memory-bytes or "
            "--gpu-memory-utilization"
        )


def check_layers(
    layers: dict[str, "Attention"],
    block_size: int,
    config: EvictionConfig,
    backends: tuple[str, ...],
) -> None:
    """Refuse attention layers that eviction cannot serve exactly as asked.

    Args:
        layers: the full-attention layers of the loaded model, by name.
        block_size: token slots of a block.
        backends: names of the attention backends that eviction works with.

    Raises:
        EvictionError: names the setting and what to change.
    """
    if reason := next(_layer_reasons(layers, block_size, config, backends), None):
        raise EvictionError(f"--kv-eviction {config.policy.name}: {reason}")


def _layer_reasons(
    layers: dict[str, "Attention"],
    block_size: int,
    config: EvictionConfig,
    backends: tuple[str, ...],
) -> Iterator[str]:
    if not layers:
        yield "the model has no full-attention layer to evict from; remove --kv-eviction"
    for name, layer in layers.items():
        if layer.kv_sharing_target_layer_name is not None:
            yield f"layer {name} shares another layer's KV cache; remove --kv-eviction"
        if getattr(layer.impl, "alibi_slopes", None) is not None:
            yield f"layer {name} uses ALiBi, which goes by slots; remove --kv-eviction"
        if getattr(layer.impl, "logits_soft_cap", 0):
            yield f"layer {name} caps its attention logits; remove --kv-eviction"
        if layer.head_size_v != layer.head_size:
            yield f"layer {name} has values of another size than its keys; remove --kv-eviction"
        if (backend := layer.attn_backend.get_name()) not in backends:
            yield (
                f"attention backend {backend} is not supported; set --attention-backend to one of "
                f"{', '.join(backends)}"
            )
        group_size = layer.num_heads // layer.num_kv_heads
        if reason := RingLayout(config.window, group_size, block_size).misfit():
            yield reason
