"""Which requests can never be served: they are rejected before they are scheduled."""

from vllm.config import VllmConfig
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest

from vase_vllm.config import EvictionConfig
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.query_ring import RingLayout


def reason_to_reject(vllm_config: VllmConfig, request: EngineCoreRequest) -> str | None:
    """Why a request can never be served under eviction, in one line, or None."""
    config = EvictionConfig.from_vllm(vllm_config)
    if config is None:
        return None
    if request.resumable:
        # Its prompt grows while it runs, and a row's header is fixed when the row is made.
        return (
            "Streaming-input sessions are not supported with --kv-eviction: send each turn as a "
            "request of its own, or serve without --kv-eviction."
        )
    if reason := _reason_of_own_settings(request):
        return reason
    prompt_len = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    return _reason_not_to_fit(vllm_config, config, prompt_len)


def _reason_of_own_settings(request: EngineCoreRequest) -> str | None:
    """Why a request's own settings of eviction would have no effect, or None."""
    sampling = request.sampling_params
    for key in (sampling.extra_args or {}) if sampling is not None else ():
        if "evict" in key.lower():
            return (
                f"vllm_xargs.{key}: a request has no settings of its own for --kv-eviction; "
                "remove it, and set --kv-eviction-config where the server starts."
            )
    return None


def _reason_not_to_fit(
    vllm_config: VllmConfig, config: EvictionConfig, prompt_len: int
) -> str | None:
    """Why a prompt of ``prompt_len`` tokens can never fit, or None.

    Until its first eviction a sequence needs a block for every token, with a dense prefill for all
    of its prompt; if the whole pool has fewer, the request would wait for ever.
    """
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if not num_blocks:
        return None
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    block_size = vllm_config.cache_config.block_size
    group_size = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    num_slots = min(config.schedule.first_eviction(prompt_len), model.max_model_len)
    num_state_blocks = RingLayout(config.window, group_size, block_size).num_blocks
    num_required = num_state_blocks + cdiv(num_slots, block_size)
    # vLLM adds up the blocks of the engines behind this API server: all of them, or its own behind
    # an external or hybrid load balancer. Block 0 of each engine's pool is the null block.
    num_engines = (
        parallel.data_parallel_size_local
        if parallel.local_engines_only
        else parallel.data_parallel_size
    )
    num_usable = num_blocks // num_engines - 1
    if num_required <= num_usable:
        return None
    return (
        f"The prompt ({prompt_len} tokens) needs {num_required} KV cache blocks until its first "
        f"eviction, and the pool has {num_usable}: shorten the prompt, set --kv-eviction-config."
        "prefill bounded, or raise --kv-cache-memory-bytes or --gpu-memory-utilization."
    )
