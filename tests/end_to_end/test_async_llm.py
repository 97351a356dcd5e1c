"""``AsyncLLM`` from Python: the same settings, the engine core in a process of its own."""

import asyncio

import pytest
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.support.engines import random_prompt

pytestmark = pytest.mark.slow


async def generate(engine, request_id, prompt, num_tokens):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    if isinstance(prompt, list):
        prompt = TokensPrompt(prompt_token_ids=prompt)
    else:
        # Of a session vLLM wants what is new.
        params.output_kind = RequestOutputKind.DELTA
    outputs = [output async for output in engine.generate(prompt, params, request_id)]
    return outputs[-1].outputs[0].token_ids


async def session(turns):
    """A prompt that grows while its request runs."""
    for turn in turns:
        yield StreamingInput(prompt=TokensPrompt(prompt_token_ids=turn))


async def run(model):
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=2048,
            block_size=32,
            kv_cache_memory_bytes=2 << 20,
            # One process less that imports vLLM.
            distributed_executor_backend="uni",
            additional_config={"kv_eviction": {"policy": "vase", "budget": 96, "window": 16}},
        )
    )
    try:
        prompts = [random_prompt(length, length) for length in (20, 200)]
        together = await asyncio.gather(
            *(generate(engine, str(i), prompt, 120) for i, prompt in enumerate(prompts))
        )
        with pytest.raises(VLLMValidationError, match="KV cache blocks until its first eviction"):
            await generate(engine, "too long", random_prompt(1900, 0), 5)
        with pytest.raises(VLLMValidationError, match="Streaming-input sessions are not supported"):
            await generate(engine, "session", session(prompts), 5)
        alone = [await generate(engine, f"alone{i}", p, 120) for i, p in enumerate(prompts)]
        (stats,) = await engine.collective_rpc("get_kv_eviction_stats")
        return together, alone, stats
    finally:
        engine.shutdown()


def test_async_llm_evicts(models, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    together, alone, stats = asyncio.run(run(models.qwen3()))
    assert together == alone
    # Two of the short prompt and seven of the long one, twice.
    assert stats["evictions"] == 18
