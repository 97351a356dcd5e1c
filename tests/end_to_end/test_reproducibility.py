"""The same request gives the same tokens, whatever happens around it."""

import pytest

from tests.support.engines import (
    add_request,
    drain,
    drain_counting_preemptions,
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
    scheduler,
)

pytestmark = pytest.mark.slow

EVICTION = {"budget": 96, "window": 16}
NUM_TOKENS = 160


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(3 + 9 * seed, seed) for seed in range(32)]


@pytest.fixture(scope="module")
def alone(models, prompts):
    """Each request by itself: the tokens that it must have in every company."""
    with engine(models.qwen3(), EVICTION) as llm:
        return [generate(llm, [prompt], greedy(NUM_TOKENS))[0] for prompt in prompts]


@pytest.mark.parametrize("order", ["in-order", "reversed"])
def test_alone_equals_in_a_batch_of_32(models, prompts, alone, order):
    step = 1 if order == "in-order" else -1
    with engine(models.qwen3(), EVICTION) as llm:
        assert generate(llm, prompts[::step], greedy(NUM_TOKENS))[::step] == alone


def test_the_seed_and_the_request_decide_the_draws(models, prompts, alone):
    with engine(models.qwen3(), {**EVICTION, "seed": 1}) as llm:
        other_seed = generate(llm, prompts[:8], greedy(NUM_TOKENS))
    assert all(a != b for a, b in zip(alone, other_seed, strict=False))
    # Deterministic top-k, for contrast, has no seed.
    greedy_tokens = []
    for seed in (0, 1):
        with engine(models.qwen3(), {**EVICTION, "sampling": "greedy", "seed": seed}) as llm:
            greedy_tokens.append(generate(llm, prompts[:8], greedy(NUM_TOKENS)))
    assert greedy_tokens[0] == greedy_tokens[1]


def test_requests_swap_rows_between_steps(models, prompts, alone):
    """Requests that end early make vLLM move the others to lower rows of its batch."""
    with engine(models.qwen3(), EVICTION) as llm:
        for index, prompt in enumerate(prompts[:12]):
            add_request(llm, str(index), prompt, greedy(NUM_TOKENS if index % 2 else index + 3))
        results = drain(llm)
    for index in range(1, 12, 2):
        assert results[str(index)] == alone[index]


def test_preempted_after_evictions_and_resumed(models, prompts, alone):
    """A request that has evicted is thrown out by more urgent ones and comes back right."""
    # 23 blocks hold one such sequence (1 + 4 blocks) and the urgent ones only in part.
    page = 2 * 2 * 32 * 128 * 4
    with engine(
        models.qwen3(),
        EVICTION | {"admission": "optimistic"},
        kv_cache_memory_bytes=24 * page,
        scheduling_policy="priority",
        max_num_batched_tokens=64,
    ) as llm:
        add_request(llm, "victim", prompts[5], greedy(NUM_TOKENS), priority=9)
        for _ in range(120):
            llm.llm_engine.step()
        before = eviction_stats(llm)["evictions"]
        assert before >= 4
        for index in range(6, 12):
            add_request(llm, str(index), prompts[index], greedy(NUM_TOKENS), priority=0)
        results, preemptions = drain_counting_preemptions(llm)
        assert preemptions["victim"] > 0
        assert num_used_blocks(llm) == 0
    assert results.pop("victim") == alone[5]
    assert all(tokens == alone[int(index)] for index, tokens in results.items())


def test_every_running_request_is_preempted_at_once(models, prompts, alone):
    """vLLM's reset of the prefix cache with running requests: all compute their output again."""
    with engine(models.qwen3(), EVICTION) as llm:
        for index in range(6):
            add_request(llm, str(index), prompts[index], greedy(NUM_TOKENS))
        for steps in (100, 40):
            for _ in range(steps):
                llm.llm_engine.step()
            evictions = eviction_stats(llm)["evictions"]
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)
            assert num_used_blocks(llm) == 0
        results = drain(llm)
        # They evicted again on the way.
        assert eviction_stats(llm)["evictions"] > evictions + 6
    assert [results[str(index)] for index in range(6)] == alone[:6]


def test_a_bounded_prefill_alone_in_company_and_after_a_preemption(models, prompts):
    """Whatever else is in the batch, and wherever a preemption falls."""
    chosen = [prompts[31], prompts[20], prompts[3]]
    with engine(models.qwen3(), EVICTION | {"prefill": "bounded"}) as llm:
        alone = [generate(llm, [prompt], greedy(NUM_TOKENS))[0] for prompt in chosen]
        for steps in (3, 60):
            for index, prompt in enumerate(chosen):
                add_request(llm, str(index), prompt, greedy(NUM_TOKENS))
            for _ in range(steps):
                llm.llm_engine.step()
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)
            results = drain(llm)
            assert [results[str(index)] for index in range(3)] == alone
        assert num_used_blocks(llm) == 0


@pytest.mark.parametrize("chunk", [17, 33, 2048])
def test_eviction_in_the_middle_of_a_chunked_prefill(models, prompts, alone, chunk):
    """However the prompt is cut, even to single tokens at window ends, prefill evicts nothing."""
    index = 31
    with engine(models.qwen3(), EVICTION, max_num_batched_tokens=chunk) as llm:
        # A companion that decodes takes one token of every step, and shifts the cuts.
        add_request(llm, "companion", prompts[0], greedy(NUM_TOKENS))
        llm.llm_engine.step()
        add_request(llm, "long", prompts[index], greedy(NUM_TOKENS))
        prompt_length = len(prompts[index])
        num_computed = 0
        while num_computed < prompt_length:
            before = eviction_stats(llm)["evictions"]
            llm.llm_engine.step()
            live = {key.split("-")[0]: value for key, value in scheduler(llm).requests.items()}
            num_computed = live["long"].num_computed_tokens
            # Whatever evicts while the long prompt is read is the companion.
            evicted = eviction_stats(llm)["evictions"] - before
            first = 112
            companion = live["companion"].num_computed_tokens - 1 if "companion" in live else 0
            assert evicted == (companion >= first and (companion - first) % 16 == 0)
        assert drain(llm)["long"] == alone[index]
