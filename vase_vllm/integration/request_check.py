"""Which requests can never be served: they are rejected before they are scheduled."""

from vllm.config import VllmConfig
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.layout.block_table_row import NEVER
from vase_vllm.request_settings import POLICY, PROMPT, settings_of_request


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
    sampling = request.sampling_params
    try:
        own = settings_of_request(config, sampling.extra_args if sampling is not None else None)
    except EvictionError as error:
        return f"{error}."
    if (
        own is None
        and config.prefill == "bounded"
        and vllm_config.model_config.get_sliding_window()
    ):
        # A pool that bounds every prompt may be smaller than one request without eviction needs
        # in all groups of layers, of which an API server knows only those that evict.
        return (
            f"vllm_xargs.{POLICY}: a request cannot opt out of eviction in a model with "
            "sliding-window layers under --kv-eviction-config.prefill bounded; remove it."
        )
    prompt_len = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    max_tokens = sampling.max_tokens if sampling is not None else None
    return _reason_not_to_fit(vllm_config, config, own, prompt_len, max_tokens)


def _reason_not_to_fit(
    vllm_config: VllmConfig,
    config: EvictionConfig,
    own: EvictionConfig | None,
    prompt_len: int,
    max_tokens: int | None,
) -> str | None:
    """Why a request can never fit, or None.

    Until its first eviction a sequence needs a block for every token, with a dense prefill for all
    of its prompt; if the whole pool has fewer, the request would wait for ever. One that opts out
    of eviction, or ends before it could evict, needs a block for every token of its longest output.

    Args:
        config: of the server.
        own: of the request; None, if it opts out of eviction.
        prompt_len: tokens of the prompt.
        max_tokens: of the output, if it is limited.
    """
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if not num_blocks:
        return None
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    block_size = vllm_config.cache_config.block_size
    group_size = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    longest = model.max_model_len
    if max_tokens is not None:
        longest = min(longest, prompt_len + max_tokens)
    first = NEVER
    if own is not None and own.schedule.comes_to_evict(prompt_len, longest):
        first = own.schedule.first_eviction(prompt_len)
    num_state_blocks = config.num_state_blocks(
        group_size, block_size, model.get_head_size(), model.dtype
    )
    num_required = config.schedule.num_row_blocks(longest, first, block_size, num_state_blocks)
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
    if own is None:
        return (
            f"The request ({longest} tokens with its output) needs {num_required} KV cache "
            f"blocks without eviction, and the pool has {num_usable}: lower max_tokens or remove "
            f"vllm_xargs.{POLICY}."
        )
    remedy = "set --kv-eviction-config.prefill bounded"
    if own.prompt == "keep":
        remedy = f"set vllm_xargs.{PROMPT} evict, which needs less"
    return (
        f"The prompt ({prompt_len} tokens) needs {num_required} KV cache blocks until its first "
        f"eviction, and the pool has {num_usable}: shorten the prompt, {remedy}, or raise "
        "--kv-cache-memory-bytes or --gpu-memory-utilization."
    )
