"""vLLM's scheduler as an engine gets it, with a worker that returns a token for every request."""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.common import paths
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec

MODEL = paths.MODELS / "qwen3-8b"
BLOCK_SIZE, HEAD_SIZE, KV_HEADS, GROUP_SIZE = 16, 128, 8, 4
"""Of Qwen3-8B."""
TOKEN, STOP_TOKEN = 7, 8


def state_blocks(config: EvictionConfig) -> int:
    """Blocks of a sequence beside those of its tokens, in bf16."""
    return config.num_state_blocks(GROUP_SIZE, BLOCK_SIZE, HEAD_SIZE, torch.bfloat16)


def scheduler_of(
    engine: VllmConfig, spec: FullAttentionSpec, num_blocks: int, log_stats: bool
) -> Scheduler:
    """The scheduler that an engine of this config gets, for one group of one layer.

    Args:
        spec: of the layer.
        num_blocks: of the pool, the null block among them.
        log_stats: whether it counts for ``/metrics``.
    """
    engine.cache_config.num_gpu_blocks = num_blocks
    return engine.scheduler_config.get_scheduler_cls()(
        vllm_config=engine,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(engine),
        block_size=spec.block_size,
        hash_block_size=spec.block_size,
        log_stats=log_stats,
    )


class Requests:
    """Makes requests as an engine's front end does.

    Args:
        block_size: token slots of a block, by which prompts are hashed.
    """

    def __init__(self, block_size: int) -> None:
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(block_size, hash_function)

    def make(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        stop_token: int,
        own: dict[str, Any] | None = None,
    ) -> Request:
        """A request that ends after ``max_tokens`` or with the stop token.

        Args:
            own: its own settings of eviction.
        """
        parameters = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[stop_token], extra_args=own
        )
        parameters.update_from_generation_config({}, None)
        return Request(request_id, prompt, parameters, None, block_hasher=self._hasher)


class LoneScheduler:
    """A scheduler for one group of layers of Qwen3-8B.

    Args:
        config: of the evictions; None is the full cache.
        num_blocks: of the pool that can be used.
        max_num_seqs, max_num_batched_tokens, max_model_len: of the engine.
    """

    def __init__(
        self,
        config: EvictionConfig | None,
        num_blocks: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        settings: dict[str, Any] = {}
        if config is not None:
            settings = {"policy": config.policy.name, "budget": config.budget}
            settings |= {"window": config.window, "admission": config.admission}
        arguments = EngineArgs(
            str(MODEL),
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            additional_config={"kv_eviction": settings} if settings else {},
        )
        engine = arguments.create_engine_config()
        shape = {"block_size": BLOCK_SIZE, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
        shape["dtype"] = engine.model_config.dtype
        spec: FullAttentionSpec = FullAttentionSpec(**shape)
        if config is not None:
            spec = EvictionSpec(
                **shape, schedule=config.schedule, num_state_blocks=state_blocks(config)
            )
        # Statistics as a server has them: what it counts is part of a step.
        self.scheduler = scheduler_of(engine, spec, 1 + num_blocks, log_stats=True)
        self._requests = Requests(BLOCK_SIZE)
        self._ends_after: dict[str, int] = {}

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, ends_after: int | None = None
    ) -> None:
        """Queue a request.

        Args:
            max_tokens: what the scheduler is told.
            ends_after: tokens after which the output ends by itself; None is never.
        """
        if ends_after is not None:
            self._ends_after[request_id] = ends_after
        request = self._requests.make(request_id, prompt, max_tokens, STOP_TOKEN)
        self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        """One step of the scheduler and of the worker."""
        output = self.scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        sampled = [self._sampled(request_id) for request_id in ids]
        index = {request_id: number for number, request_id in enumerate(ids)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(ids, index, sampled))
        return output

    def _sampled(self, request_id: str) -> list[int]:
        """The next token of an output; none while tokens that are known are computed."""
        request = self.scheduler.requests[request_id]
        # Scheduling has counted this step's tokens already.
        if request.num_computed_tokens < request.num_tokens:
            return []
        is_last = request.num_output_tokens + 1 == self._ends_after.get(request_id)
        return [STOP_TOKEN if is_last else TOKEN]
