"""What the scheduler reports for `/metrics`, against what can be seen from outside of it."""

import pickle
from collections import Counter

import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tests.support.simulated_worker import Simulation, make_scheduler
from vase_vllm.engine.eviction_time import put_microseconds, take_microseconds

EVICTION = {"policy": "random", "budget": 24, "window": 8, "sinks": 1}
"""A sequence at its bound holds 8 blocks of 4 tokens, and one of its queries."""


def serve(models, admission, prompts, own_of_the_first=None):
    """Requests that evict, in a pool for two sequences at their bound and 4 blocks.

    Args:
        own_of_the_first: the first request's own settings of eviction.

    Returns:
        The simulation, and what was seen of its steps.
    """
    scheduler = make_scheduler(
        models.qwen3(),
        EVICTION | {"admission": admission},
        block_size=4,
        num_blocks=2 * 9 + 4 + 1,
        chunk=1000,
        log_stats=True,
    )
    simulation = Simulation(scheduler)
    for index, prompt in enumerate(prompts):
        own = own_of_the_first if index == 0 else None
        simulation.add(str(index), prompt, max_tokens=75 if own else 65, own=own)
    requests = dict(scheduler.requests)
    seen = Counter()
    while scheduler.has_unfinished_requests():
        before = {id: (r.num_computed_tokens, r.num_preemptions) for id, r in requests.items()}
        running = set(scheduler.running)
        simulation.step()
        preempted = [id for id, r in requests.items() if r.num_preemptions > before[id][1]]
        for request_id in preempted:
            num_computed = before[request_id][0]
            first = simulation.config.schedule.first_eviction(len(prompts[int(request_id)]))
            kind = "after" if num_computed > first else "before"
            seen[f"preemptions_{kind}"] += 1
            seen[f"preempted_tokens_{kind}"] += num_computed
        seen["admissions"] += len({r for r in scheduler.running if r not in running})
        seen["deferrals"] += bool(scheduler.waiting and not preempted)
    return simulation, seen


def total(simulation, name):
    return sum(getattr(of_step, name) for of_step in simulation.statistics)


WHEN = ("before", "after")
PROMPTS = [[10 + index] * 3 for index in range(6)]


def test_requests_wait_for_what_is_promised(models):
    """The third has room for its prompt, and none to grow to its bound."""
    simulation, seen = serve(models, "reserve", PROMPTS)
    assert total(simulation, "deferrals_promised") == seen["deferrals"] > 50
    assert total(simulation, "deferrals_full") == 0
    assert total(simulation, "admissions") == len(PROMPTS)
    assert total(simulation, "preemptions_before") + total(simulation, "preemptions_after") == 0


def test_requests_wait_for_free_blocks(models):
    """A prompt of 20 blocks waits until the others have ended, for its own tokens."""
    for admission in ("reserve", "optimistic"):
        simulation, seen = serve(models, admission, [*PROMPTS[:2], [20] * 78])
        assert total(simulation, "deferrals_full") == seen["deferrals"] > 40
        assert total(simulation, "deferrals_promised") == 0


def test_preemptions_are_counted_by_what_is_lost(models):
    # The first one grows on while others evict.
    simulation, seen = serve(models, "optimistic", PROMPTS, {"kv_eviction": "none"})
    names = [f"{what}_{when}" for what in ("preemptions", "preempted_tokens") for when in WHEN]
    assert {name: total(simulation, name) for name in names} == {name: seen[name] for name in names}
    assert seen["preemptions_before"] > 0
    assert seen["preemptions_after"] > 0
    assert total(simulation, "admissions") == len(PROMPTS) + sum(
        seen[f"preemptions_{w}"] for w in WHEN
    )


WHEN = ("before", "after")


@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
def test_outstanding_blocks_are_those_that_come_until_the_bound(models, admission):
    scheduler = make_scheduler(
        models.qwen3(), EVICTION | {"admission": admission}, 4, 100, 1000, log_stats=True
    )
    simulation = Simulation(scheduler)
    simulation.add("0", [10] * 3, max_tokens=50)
    while scheduler.has_unfinished_requests():
        simulation.step()
        held = simulation.num_used_blocks
        # At the end it holds none, and needs none.
        wanted = 9 - held if scheduler.requests else 0
        assert simulation.statistics[-1].outstanding_blocks == wanted


def test_the_time_of_evictions_travels_with_a_steps_output():
    output = ModelRunnerOutput(["r"], {"r": 0}, [[5]])
    sent = pickle.loads(pickle.dumps(put_microseconds(output, 1234)))
    assert take_microseconds(sent) == 1234
    assert sent == output
    assert take_microseconds(sent) == 0


def test_an_output_that_steps_share_stays_as_it_is():
    assert take_microseconds(put_microseconds(EMPTY_MODEL_RUNNER_OUTPUT, 5)) == 5
    assert EMPTY_MODEL_RUNNER_OUTPUT.kv_connector_output is None
