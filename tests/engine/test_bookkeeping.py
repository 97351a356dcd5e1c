"""Whatever requests come when: every block, ring entry and header holds what it should.

``FUZZ_EXAMPLES=100000 pytest tests/engine/test_bookkeeping.py`` tries as many cases.
"""

import os
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.simulated_worker import Simulation, make_scheduler
from vase_vllm.config import EvictionConfig

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
LONGEST_PROMPT = 80
LONGEST_OUTPUT = 60
BEGINNINGS = [[2 + 7 * which + p % 5 for p in range(60)] for which in range(2)]


@dataclass(frozen=True)
class Arrival:
    """A request: a prompt that may begin like another's, and what becomes of it.

    Attributes:
        step: at which it arrives.
        aborted_after: steps after which it is aborted, if it still runs.
        eviction: its own ``kv_eviction``, of its budget the part that it gives up, and its prompt.
    """

    which: int
    shared: int
    own: int
    max_tokens: int
    step: int
    aborted_after: int | None
    eviction: tuple[str | None, int, str | None]

    def own_settings(self, config: EvictionConfig) -> dict[str, Any]:
        """What it says of eviction, as far as the server lets it."""
        policy, less, prompt = self.eviction
        if policy is not None:
            return {"kv_eviction": policy}
        own: dict[str, Any] = {}
        if less:
            lowest = config.window + max(config.sinks, 1)
            own["kv_eviction_budget"] = max(config.budget - less, lowest)
        if prompt is not None and config.prefill == "dense":
            own["kv_eviction_prompt"] = prompt
        return own


arrivals = st.builds(
    Arrival,
    which=st.integers(0, 1),
    shared=st.integers(0, 60),
    own=st.integers(1, LONGEST_PROMPT - 60),
    max_tokens=st.integers(1, LONGEST_OUTPUT),
    step=st.integers(0, 40),
    aborted_after=st.none() | st.integers(0, 60),
    eviction=st.tuples(
        st.sampled_from([None, None, None, "none"]),
        st.sampled_from([0, 0, 1, 9, 30]),
        st.sampled_from([None, "keep", "evict"]),
    ),
)


@st.composite
def eviction_settings(draw):
    window = draw(st.integers(1, 12))
    kept = draw(st.integers(1, 40))
    prefill, prompt = draw(
        st.sampled_from([("dense", "evict"), ("bounded", "evict"), ("dense", "keep")])
    )
    return {
        # The books do not depend on the policy, and this one has no settings of its own.
        "policy": "random",
        "budget": kept + window,
        "window": window,
        "sinks": draw(st.integers(0, min(kept, 4))),
        "admission": draw(st.sampled_from(["expected", "reserve", "optimistic"])),
        "prefill": prefill,
        "prompt": prompt,
    }


@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    eviction=eviction_settings(),
    requests=st.lists(arrivals, min_size=2, max_size=12),
    block_size=st.sampled_from([4, 8, 16]),
    num_spare=st.integers(0, 40),
    chunk=st.sampled_from([8, 24, 100]),
    reset_at=st.none() | st.integers(1, 120),
)
def test_every_block_holds_what_it_should(
    models, eviction, requests, block_size, num_spare, chunk, reset_at
):
    """Hits, copies of copies, evictions, preemptions, aborts, a pool that is full."""
    config = EvictionConfig.parse(eviction)
    # What a kept prompt or one that is evicted from needs, or a request that opts out.
    longest = LONGEST_PROMPT + max(config.schedule.bound, LONGEST_OUTPUT)
    scheduler = make_scheduler(models.qwen3(), eviction, block_size, 1000, chunk)
    simulation = Simulation(scheduler)
    # The null block, the state blocks, and what the longest prompt holds until its first eviction.
    num_blocks = 1 + simulation.spec.num_blocks(longest) + num_spare
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, block_size, num_blocks, chunk))
    for _ in range(20):
        # With "expected", a history that makes room look larger than it is.
        simulation.scheduler._admission.output_lengths.add(3, cut_off=False)
    waiting = sorted(enumerate(requests), key=lambda item: item[1].step)
    aborts = {
        str(index): request.step + request.aborted_after
        for index, request in enumerate(requests)
        if request.aborted_after is not None
    }
    for number in range(6000):
        while waiting and waiting[0][1].step <= number:
            index, request = waiting.pop(0)
            prompt = BEGINNINGS[request.which][: request.shared] + [100 + index] * request.own
            own = request.own_settings(config)
            simulation.add(str(index), prompt, request.max_tokens, own=own)
        for request_id in [request_id for request_id, step in aborts.items() if step == number]:
            simulation.abort(request_id)
        if number == reset_at:
            simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
        if not waiting and not simulation.scheduler.has_requests():
            break
        simulation.step()
    assert not simulation.scheduler.has_unfinished_requests(), "the scheduler hangs"
    assert simulation.num_used_blocks == 0
    for index, request in enumerate(requests):
        assert simulation.num_cached_tokens.get(str(index), 0) <= request.shared


def test_512_requests_over_a_pool_of_70_blocks(models):
    """Every request ends with all of its tokens, and every block comes back."""
    eviction = {"budget": 40, "window": 8, "sinks": 1, "admission": "optimistic"}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, 70, chunk=100))
    for index in range(512):
        simulation.add(str(index), [2 + index % 50] * (1 + index % 37), 10 + index % 61)
    for _ in range(60_000):
        if not simulation.scheduler.has_unfinished_requests():
            break
        simulation.step()
    assert simulation.num_output_tokens == {str(i): 10 + i % 61 for i in range(512)}
    assert simulation.num_used_blocks == 0
