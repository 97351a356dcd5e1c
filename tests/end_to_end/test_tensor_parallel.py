"""Tensor parallelism: each rank evicts for its own heads, and nobody can tell from the tokens."""

import pytest

from tests.support.engines import (
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
)

pytestmark = pytest.mark.slow

EVICTION = {"budget": 48, "window": 8, "sampling": "gumbel"}
PROMPTS = [random_prompt(length, length) for length in (20, 90, 300)]
NUM_TOKENS = 80


def test_two_ranks_generate_what_one_does(models):
    with engine(models.qwen3(), EVICTION) as llm:
        alone = generate(llm, PROMPTS, greedy(NUM_TOKENS))
        expected = eviction_stats(llm)
    with engine(models.qwen3(), EVICTION, tensor_parallel_size=2) as llm:
        assert generate(llm, PROMPTS, greedy(NUM_TOKENS)) == alone
        # Draws are keyed by the head's number in the whole model: a rank that took its own numbers
        # would keep other tokens.
        assert llm.collective_rpc("get_kv_eviction_stats") == [expected, expected]
        assert expected["evictions"] == 26
        assert num_used_blocks(llm) == 0
