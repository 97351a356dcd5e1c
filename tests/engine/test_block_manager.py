"""A static number of blocks per sequence, read from vLLM's own block pool."""

import pytest
from vllm.exceptions import VLLMValidationError

from tests.support.engines import (
    BLOCK_SIZE,
    add_request,
    drain,
    drain_counting_preemptions,
    engine,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
    scheduler,
)
from vase_vllm.layout.query_ring import RingLayout

pytestmark = pytest.mark.slow

EVICTION = {"budget": 96, "window": 16}
# The models of these tests have two query heads per KV head.
NUM_STATE_BLOCKS = RingLayout(window=16, group_size=2, block_size=BLOCK_SIZE).num_blocks
BOUND = -(-(96 + 16) // BLOCK_SIZE) + NUM_STATE_BLOCKS
# Bytes of a block: 2 layers x 2 KV heads x 32 slots x (64 + 64) fp32 elements.
BLOCK_BYTES = 2 * 2 * 32 * 128 * 4


@pytest.fixture
def llm(models, request):
    with engine(models.qwen3(), EVICTION, **getattr(request, "param", {})) as llm:
        yield llm


def used_per_step(llm, prompt, num_tokens):
    """Blocks in use after each step of a request that runs alone: [(tokens computed, blocks)]."""
    add_request(llm, "r", prompt, greedy(num_tokens))
    request = None
    used = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        request = next(iter(scheduler(llm).requests.values()), None)
        if request is not None:
            used.append((request.num_computed_tokens, num_used_blocks(llm)))
    return used


def test_a_short_prompt_grows_to_the_bound_and_no_further(llm):
    used = used_per_step(llm, random_prompt(10, 0), 300)
    # The query ring comes with the query of position 96, and with it the last block of 112 tokens.
    expected = [-(-tokens // BLOCK_SIZE) if tokens <= 96 else BOUND for tokens, _ in used]
    assert [blocks for _, blocks in used] == expected
    assert max(blocks for _, blocks in used) == BOUND
    assert {blocks for tokens, blocks in used if tokens > 112} == {BOUND}
    assert num_used_blocks(llm) == 0


def test_a_long_prompt_gives_its_surplus_back_after_its_first_eviction(llm):
    used = dict(used_per_step(llm, random_prompt(500, 0), 100))
    first = 96 + 16 * -(-(500 + 1 - 96) // 16)
    # The step of position `first` evicts; the next one finds the surplus gone.
    assert used[first + 1] == NUM_STATE_BLOCKS + -(-first // BLOCK_SIZE)
    assert all(blocks == BOUND for tokens, blocks in used.items() if tokens > first + 1)
    assert num_used_blocks(llm) == 0


@pytest.mark.parametrize("num_steps", [1, 3, 60, 200], ids=lambda n: f"after-{n}-steps")
def test_blocks_of_an_aborted_request_are_free(llm, num_steps):
    add_request(llm, "r", random_prompt(300, 1), greedy(400))
    for _ in range(num_steps):
        llm.llm_engine.step()
    assert num_used_blocks(llm) >= BOUND
    llm.llm_engine.abort_request(["r"])
    drain(llm)
    assert num_used_blocks(llm) == 0


def test_many_sequences_stay_within_the_bound_each(llm):
    prompts = [random_prompt(5 + seed, seed) for seed in range(20)]
    for index, prompt in enumerate(prompts):
        add_request(llm, str(index), prompt, greedy(200))
    for _ in range(150):
        llm.llm_engine.step()
    assert num_used_blocks(llm) == 20 * BOUND
    drain(llm)
    assert num_used_blocks(llm) == 0


def test_freed_blocks_carry_nothing_over(llm):
    """A request in blocks that others have used gives the tokens it gives in fresh ones."""
    prompt = random_prompt(50, 3)
    fresh = generate(llm, [prompt], greedy(150))
    generate(llm, [random_prompt(400, seed) for seed in range(10, 30)], greedy(60))
    assert generate(llm, [prompt], greedy(150)) == fresh


@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
def test_a_pool_for_two_sequences_serves_many_and_never_hangs(models, admission):
    """Requests wait or are preempted, and all finish, with the tokens that a large pool gives."""
    prompts = [random_prompt(5 + 20 * seed, seed) for seed in range(12)]
    pool = {"kv_cache_memory_bytes": 12 * BLOCK_BYTES}
    with engine(models.qwen3(), EVICTION | {"admission": admission}, **pool) as llm:
        for index, prompt in enumerate(prompts):
            add_request(llm, str(index), prompt, greedy(150))
        results, preemptions = drain_counting_preemptions(llm)
        assert len(results) == 12, "the engine hangs"
        assert any(preemptions.values()) == (admission == "optimistic")
        assert num_used_blocks(llm) == 0
        for index in range(0, 12, 3):
            assert [results[str(index)]] == generate(llm, [prompts[index]], greedy(150))


@pytest.mark.parametrize(("num_tokens", "num_state_blocks"), [(103, 0), (104, NUM_STATE_BLOCKS)])
def test_only_a_sequence_that_can_come_to_evict_has_a_ring(llm, num_tokens, num_state_blocks):
    """The first eviction precedes the step of position 112, and the last token has no such step."""
    used = used_per_step(llm, random_prompt(10, 0), num_tokens)
    assert used[0] == (10, 1)
    # Both have 112 tokens in 4 blocks.
    assert max(blocks for _, blocks in used) == 4 + num_state_blocks


@pytest.mark.parametrize(("stop", "num_blocks"), [(87, 3), (89, 4 + NUM_STATE_BLOCKS)])
def test_the_ring_comes_with_the_first_query_that_is_kept(llm, stop, num_blocks):
    """The first eviction, at 112, asks for the queries from 96 on; the request may write 300."""
    add_request(llm, "r", random_prompt(10, 0), greedy(300))
    llm.llm_engine.step()
    (request,) = scheduler(llm).requests.values()
    while request.num_computed_tokens < 9 + stop:
        llm.llm_engine.step()
    assert num_used_blocks(llm) == num_blocks
    llm.llm_engine.abort_request(["r"])
    drain(llm)


def test_reservation_knows_how_long_a_request_can_become(models):
    """Outputs that cannot reach the bound reserve no more than they can fill."""
    pool = {"kv_cache_memory_bytes": 13 * BLOCK_BYTES}
    with engine(models.qwen3(), EVICTION, **pool) as llm:
        # 12 usable blocks, two for each: none of these comes to evict, so that they need no block
        # of state.
        for index in range(8):
            add_request(llm, str(index), random_prompt(10, index), greedy(50))
        llm.llm_engine.step()
        assert len(scheduler(llm).running) == 6
        assert num_used_blocks(llm) == 6
        results, preemptions = drain_counting_preemptions(llm)
        assert num_used_blocks(llm) == 0
    assert len(results) == 8
    assert not any(preemptions.values())


@pytest.mark.parametrize("llm", [{"kv_cache_memory_bytes": 12 * BLOCK_BYTES}], indirect=True)
def test_a_prompt_that_can_never_fit_is_refused_and_nothing_else_lost(llm):
    """11 usable blocks: one for the state, ten for tokens until the first eviction."""
    add_request(llm, "running", random_prompt(20, 0), greedy(100))
    llm.llm_engine.step()
    fits = 96 + 16 * 14 - 1
    with pytest.raises(VLLMValidationError, match="needs 12 KV cache blocks") as error:
        add_request(llm, "huge", random_prompt(fits + 1, 1), greedy(30))
    assert "\n" not in str(error.value)
    assert "--kv-cache-memory-bytes" in str(error.value)
    add_request(llm, "largest", random_prompt(fits, 2), greedy(30))
    assert {i: len(tokens) for i, tokens in drain(llm).items()} == {"running": 100, "largest": 30}


def test_start_up_counts_the_bound(models):
    """vLLM's own concurrency and start-up check go by the bound, not by the model length."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    with engine(models.qwen3(), EVICTION, kv_cache_memory_bytes=50 * BLOCK_BYTES) as llm:
        kv_cache_config = scheduler(llm).kv_cache_config
        concurrency = get_max_concurrency_for_kv_cache_config(
            llm.llm_engine.vllm_config, kv_cache_config
        )
        assert concurrency == kv_cache_config.num_blocks / BOUND


def test_a_pool_smaller_than_the_bound_is_refused(models):
    with (
        pytest.raises(ValueError, match=r"--kv-eviction-config\.budget"),
        engine(models.qwen3(), EVICTION, kv_cache_memory_bytes=(BOUND - 1) * BLOCK_BYTES),
    ):
        pass
