"""Async scheduling: the next step is scheduled before the last one's tokens are known.

vLLM's CPU platform switches it off; here it stays on, so that what GPUs run by default is tested.
"""

import pytest
from vllm.platforms.cpu import CpuPlatform

from tests.support.engines import (
    add_request,
    drain_counting_preemptions,
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
)
from vase_vllm.engine.scheduler import EvictionAsyncScheduler

pytestmark = pytest.mark.slow

EVICTION = {"budget": 96, "window": 16}
PROMPTS = [random_prompt(5 + 23 * seed, seed) for seed in range(10)]
NUM_TOKENS = 150
BLOCK_BYTES = 2 * 2 * 32 * 128 * 4


@pytest.fixture(scope="module")
def expected(models):
    """Tokens and evictions of the ordinary scheduler."""
    with engine(models.qwen3(), EVICTION) as llm:
        return generate(llm, PROMPTS, greedy(NUM_TOKENS)), eviction_stats(llm)["evictions"]


@pytest.fixture
def async_scheduling(monkeypatch):
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)
    )


@pytest.mark.usefixtures("async_scheduling")
def test_stale_counts_under_async_scheduling(models, expected):
    """Evictions come from positions, which are exact, and not from what has been sampled."""
    with engine(models.qwen3(), EVICTION) as llm:
        core = llm.llm_engine.engine_core.engine_core
        assert isinstance(core.scheduler, EvictionAsyncScheduler)
        assert core.batch_queue_size == 2
        assert generate(llm, PROMPTS, greedy(NUM_TOKENS)) == expected[0]
        assert eviction_stats(llm)["evictions"] == expected[1]
        assert num_used_blocks(llm) == 0


@pytest.mark.usefixtures("async_scheduling")
def test_blocks_are_freed_only_when_no_step_in_flight_reads_them(models, expected):
    """In a small pool, surplus blocks are handed on at once: too early would corrupt the others."""
    num_blocks = 26
    eviction = EVICTION | {"admission": "optimistic"}
    with engine(models.qwen3(), eviction, kv_cache_memory_bytes=num_blocks * BLOCK_BYTES) as llm:
        for index, prompt in enumerate(PROMPTS):
            add_request(llm, str(index), prompt, greedy(NUM_TOKENS))
        results, preemptions = drain_counting_preemptions(llm)
        assert any(preemptions.values())
        assert num_used_blocks(llm) == 0
    assert [results[str(index)] for index in range(len(PROMPTS))] == expected[0]
