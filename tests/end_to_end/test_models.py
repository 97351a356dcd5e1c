"""Architectures: the tokens of the full cache up to the first eviction, and evictions."""

import pytest

from tests.support.engines import engine, eviction_stats, generate, greedy, random_prompt

pytestmark = pytest.mark.slow

FIRST_EVICTION = 64


@pytest.mark.parametrize("family", ["mistral", "qwen3_moe", "gpt_oss"])
def test_tokens_up_to_the_first_eviction(models, family):
    prompts = [random_prompt(length, length) for length in (10, 40)]
    results = []
    for eviction in (None, {"budget": 48, "window": 16}):
        with engine(getattr(models, family)(), eviction) as llm:
            results.append(generate(llm, prompts, greedy(80)))
            if eviction is not None:
                assert eviction_stats(llm)["evictions"] >= 5
    for prompt, full, evicted in zip(prompts, *results, strict=True):
        num_equal = FIRST_EVICTION - len(prompt) + 1
        assert full[:num_equal] == evicted[:num_equal]
        assert full != evicted
