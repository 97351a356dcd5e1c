"""Prefix caching beside eviction: what prompts share is read once, and nothing else changes."""

import pytest

from tests.support.engines import (
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
)
from tests.support.simulated_worker import Simulation, make_scheduler
from vase_vllm.layout.block_table_row import BlockTableRow

BUDGET, WINDOW = 24, 8


@pytest.fixture
def simulation(models):
    """Blocks of 4 in plenty, chunks of 24 tokens."""
    eviction = {"budget": BUDGET, "window": WINDOW, "sinks": 1}
    return Simulation(make_scheduler(models.qwen3(), eviction, 4, 200, chunk=24))


def finish(simulation):
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()


def finish_until(simulation, num_evictions):
    while simulation.num_evictions < num_evictions:
        simulation.step()


def prompt(shared, own):
    return [2 + p % 5 for p in range(shared)] + own


def test_a_prompt_is_found_after_its_sequence_has_evicted_and_ended(simulation):
    simulation.add("first", prompt(20, [50]), 60)
    finish(simulation)
    assert simulation.num_evictions >= 5
    simulation.add("second", prompt(20, [60, 61, 62]), 60)
    finish(simulation)
    assert simulation.num_cached_tokens == {"first": 0, "second": 20}


def test_a_prompt_is_found_while_its_sequence_runs(simulation):
    simulation.add("first", prompt(20, [50]), 100)
    for _ in range(3):
        simulation.step()
    simulation.add("second", prompt(20, [60]), 100)
    finish(simulation)
    assert simulation.num_cached_tokens["second"] == 20


def test_a_copy_that_has_not_been_made_yet_is_copied_from_its_source(simulation):
    """The second request comes in the very step that puts the first one's prompt into the cache."""
    simulation.add("first", prompt(20, [50]), 100)
    simulation.step()
    simulation.add("second", prompt(20, [60]), 100)
    finish(simulation)
    assert simulation.num_cached_tokens["second"] == 20


def test_the_queries_that_score_the_first_eviction_are_computed(simulation):
    """A prompt of 52 evicts first at 56, for which the queries from 48 on are needed."""
    simulation.add("first", prompt(52, []), 20)
    finish(simulation)
    simulation.add("again", prompt(52, []), 20)
    finish(simulation)
    assert simulation.num_cached_tokens["again"] == 48


def test_a_chunk_is_found_before_the_prompt_is_read(simulation):
    simulation.add("first", prompt(60, [50]), 5)
    simulation.step()
    simulation.step()
    simulation.add("second", prompt(60, [60]), 5)
    finish(simulation)
    assert simulation.num_cached_tokens["second"] >= 24


def test_a_bounded_prefill_is_found_up_to_its_first_eviction(models):
    """A prompt of 60 evicts first at 32, for which the queries from 24 on are needed."""
    eviction = {"budget": BUDGET, "window": WINDOW, "sinks": 1, "prefill": "bounded"}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, 200, chunk=100))
    for name in ("first", "again"):
        simulation.add(name, prompt(60, []), 5)
        finish(simulation)
    # At 32, 40, 48 and 56.
    assert simulation.num_evictions == 2 * 4
    assert simulation.num_cached_tokens == {"first": 0, "again": 24}


def test_kept_prompts_share_their_blocks(simulation):
    """Three prompts of 22 tokens begin with 20 that are the same, which fill 5 blocks."""
    keep = {"kv_eviction_prompt": "keep"}
    simulation.add("first", prompt(20, [50, 51]), 60, own=keep)
    simulation.step()
    simulation.step()
    for name in ("second", "third"):
        simulation.add(name, prompt(20, [60, 61]), 60, own=keep)
    finish_until(simulation, num_evictions=9)
    rows = [row[BlockTableRow.NUM_HEADER :] for row in simulation.manager.req_to_blocks.values()]
    # At their bounds: 22 + 24 + 8 tokens each, in 14 blocks, and a block for the query ring.
    assert [len(row) for row in rows] == [15, 15, 15]
    assert rows[0][:5] == rows[1][:5] == rows[2][:5]
    assert len({block.block_id for row in rows for block in row}) == 3 * 15 - 2 * 5
    # A request that may evict from the same prompt gets copies of these blocks.
    simulation.add("evicting", prompt(20, [70]), 60)
    finish(simulation)
    assert simulation.num_cached_tokens == {"first": 0, "second": 20, "third": 20, "evicting": 20}
    assert simulation.num_used_blocks == 0


def test_what_a_step_computes_is_shared_in_that_step_and_copied_later(models):
    """As in vLLM, whose requests share a prompt that comes with all of them at once."""
    eviction = {"budget": BUDGET, "window": WINDOW, "sinks": 1}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, 200, chunk=100))
    keep = {"kv_eviction_prompt": "keep"}
    simulation.add("first", prompt(20, [50, 51]), 60, own=keep)
    simulation.add("shares", prompt(20, [60, 61]), 60, own=keep)
    simulation.add("would copy", prompt(20, [70, 71]), 60)
    simulation.step()
    assert simulation.num_cached_tokens == {"first": 0, "shares": 20, "would copy": 0}
    simulation.add("copies", prompt(20, [80, 81]), 60)
    finish(simulation)
    assert simulation.num_cached_tokens["copies"] == 20
    assert simulation.num_used_blocks == 0


def test_what_is_not_computed_after_all_is_not_found(simulation):
    """A running request can be preempted in the step that has just scheduled it."""
    simulation.add("r", prompt(20, []), 60, own={"kv_eviction_prompt": "keep"})
    request, pool = simulation.scheduler.requests["r"], simulation.pool
    cache = simulation.manager._prefix_cache
    own = pool.get_new_blocks(5)
    cache.publish_own(request, own, 0, 5)
    assert pool.get_cached_block(request.block_hashes[4], [0]) == [own[4]]
    assert cache.num_computed(own) == 0
    cache.withdraw(own[3:])
    found = [pool.get_cached_block(of_block, [0]) for of_block in request.block_hashes[:5]]
    assert found == [[own[0]], [own[1]], [own[2]], None, None]
    cache.start_step()
    cache.withdraw(own[:3])
    assert pool.get_cached_block(request.block_hashes[0], [0]) == [own[0]]
    assert cache.num_computed(own) == 5


def test_requests_that_end_before_they_could_evict_share_their_blocks(simulation):
    """A prompt of 22 tokens evicts first at 32; 33 tokens never do, and 34 do."""
    for name, own, max_tokens in (("first", 50, 11), ("second", 60, 11), ("third", 70, 12)):
        simulation.add(name, prompt(20, [own, own]), max_tokens)
        simulation.step()
        simulation.step()
    rows = [row[BlockTableRow.NUM_HEADER :] for row in simulation.manager.req_to_blocks.values()]
    assert rows[0][:5] == rows[1][:5]
    # The third one's are copies.
    assert not {block.block_id for block in rows[2]} & {block.block_id for block in rows[0]}
    finish(simulation)
    assert simulation.num_evictions == 1
    assert simulation.num_cached_tokens == {"first": 0, "second": 20, "third": 20}
    assert simulation.num_used_blocks == 0


def test_a_follow_up_shares_the_prompt_and_its_output_is_not_found(simulation):
    """The second turn's prompt holds the first one's output, which had evicted from it."""
    keep = {"kv_eviction_prompt": "keep"}
    simulation.add("first", prompt(20, []), 60, own=keep)
    finish(simulation)
    simulation.add("second", prompt(20, [7] * 60), 60, own=keep)
    finish(simulation)
    simulation.add("third", prompt(20, [7] * 60 + [8] * 60), 60, own=keep)
    finish(simulation)
    assert simulation.num_cached_tokens == {"first": 0, "second": 20, "third": 80}


@pytest.mark.parametrize(("num_blocks", "num_hit"), [(24, 0), (25, 28)])
def test_a_hit_that_the_pool_has_no_room_for_is_dropped(models, num_blocks, num_hit):
    """59 tokens and their state take 17 blocks, and a hit of 28 tokens is 7 blocks beside them."""
    eviction = {"budget": BUDGET, "window": WINDOW, "sinks": 1}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, num_blocks, chunk=24))
    for name, length in (("first", 30), ("second", 59)):
        simulation.add(name, prompt(length, []), 20)
        for _ in range(30):
            simulation.step()
    assert not simulation.scheduler.has_unfinished_requests()
    assert simulation.num_cached_tokens["second"] == num_hit


# From here on in real engines.

EVICTION = {"budget": 96, "window": 16}
SHARED = random_prompt(200, 0)
PROMPTS = [
    # Longer than the budget, shorter, and with nothing in common.
    *[SHARED + random_prompt(9, seed) for seed in (1, 2)],
    *[SHARED[:70] + random_prompt(5, seed) for seed in (3, 4)],
    random_prompt(50, 5),
]


def counter(llm, name):
    """One of vLLM's Prometheus counters, or one of ours beside them."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def cached_tokens(llm):
    """Prompt tokens that vLLM has taken from its prefix cache so far, by its own count."""
    return counter(llm, "vllm:prefix_cache_hits")


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["gumbel", "greedy"])
def test_tokens_are_those_without_prefix_caching(models, sampling):
    eviction = EVICTION | {"sampling": sampling}
    with engine(models.qwen3(), eviction, enable_prefix_caching=False) as llm:
        expected = generate(llm, PROMPTS, greedy(150))
    with engine(models.qwen3(), eviction, disable_log_stats=False) as llm:
        # One after the other, so that each finds what those before it have left.
        alone = [generate(llm, [prompt], greedy(150))[0] for prompt in PROMPTS]
        assert cached_tokens(llm) == 192 + 2 * 64
        assert generate(llm, PROMPTS, greedy(150)) == expected
        assert num_used_blocks(llm) == 0
        evictions = eviction_stats(llm)["evictions"]
        assert evictions > 50
        assert counter(llm, "vllm:kv_eviction_evictions") == evictions
    assert alone == expected


@pytest.mark.slow
def test_hybrid_models(models):
    """The sliding-window layers share their blocks as ever; a hit is one in every group."""
    with engine(models.gemma3(), EVICTION, enable_prefix_caching=False) as llm:
        expected = generate(llm, PROMPTS, greedy(120))
    with engine(models.gemma3(), EVICTION, disable_log_stats=False) as llm:
        alone = [generate(llm, [prompt], greedy(120))[0] for prompt in PROMPTS]
        assert cached_tokens(llm) > 0
        assert generate(llm, PROMPTS, greedy(120)) == expected
        assert num_used_blocks(llm) == 0
    assert alone == expected
