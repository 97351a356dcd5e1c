"""What is expected of running requests, against the plain statistics of the same lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.simulated_worker import Simulation, make_scheduler
from vase_vllm.engine.admission import (
    MARGIN,
    NUM_NEEDED,
    NUM_REMEMBERED,
    OutputLengths,
    expected_peak,
)

CUT_OFF = 10**9
lengths = st.lists(st.integers(1, 50) | st.just(CUT_OFF), max_size=80)


def remember(lengths):
    outputs = OutputLengths()
    for length in lengths:
        # Whatever length it was cut off at, it counts as longer than any.
        outputs.add(7 if length == CUT_OFF else length, cut_off=length == CUT_OFF)
    return outputs


def survival(lengths, so_far, ahead):
    longer = [length for length in lengths if length > so_far]
    if len(longer) < NUM_NEEDED:
        return 1.0
    return np.mean([length > so_far + ahead for length in longer])


@given(lengths, st.integers(0, 60), st.integers(0, 60))
def test_survival_is_that_of_the_longer_outputs(lengths, so_far, ahead):
    found = remember(lengths).survival(np.array([so_far]), np.array([ahead]))
    assert found == pytest.approx(survival(lengths, so_far, ahead))


def test_old_outputs_are_forgotten():
    outputs = remember([1000] * NUM_REMEMBERED + [10] * (NUM_REMEMBERED // 2))
    assert outputs.survival(np.array([0]), np.array([500])) == 0.5
    for _ in range(NUM_REMEMBERED // 2):
        outputs.add(10, cut_off=False)
    assert outputs.survival(np.array([0]), np.array([9, 500])).tolist() == [[1, 0]]


@given(
    lengths,
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 40), st.integers(1, 60), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([1, 4, 16]),
)
def test_the_peak_is_no_more_than_the_worst_and_no_less_than_now(lengths, requests, block_size):
    num_prompt, so_far, ahead, state = (np.array(column) for column in zip(*requests, strict=True))
    most = num_prompt + so_far + ahead
    peak = expected_peak(remember(lengths), num_prompt, so_far, most, state, block_size)
    now = (state + -(-(num_prompt + so_far) // block_size)).sum()
    worst = (state + -(-most // block_size)).sum()
    assert peak >= now
    if len(lengths) < NUM_NEEDED:
        assert peak == worst
    # At the first and the last moment, the whole list of remembered lengths says the same.
    for t in {0, int(ahead.max())}:
        runs = np.array([survival(lengths, n, t) for n in so_far])
        blocks = state + -(-np.minimum(num_prompt + so_far + t, most) // block_size)
        margin = MARGIN * np.sqrt((runs * (1 - runs) * blocks**2).sum())
        assert peak >= (runs * blocks).sum() + margin - 1e-6


def serve(models, admission, outputs):
    """Requests without a length of their own, in a pool for three sequences at their bound.

    Returns:
        Most that ran at once, and preemptions.
    """
    eviction = {"budget": 24, "window": 8, "sinks": 1, "admission": admission}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, 3 * 9 + 1, chunk=64))
    for index, length in enumerate(outputs):
        simulation.add(str(index), [10 + index % 7] * 3, max_tokens=400, stops_at=length)
    requests = dict(simulation.scheduler.requests)
    most_running = 0
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()
        most_running = max(most_running, len(simulation.scheduler.running))
    assert simulation.num_used_blocks == 0
    assert [requests[str(i)].num_output_tokens for i in range(len(outputs))] == outputs
    return most_running, sum(request.num_preemptions for request in requests.values())


SHORT = np.random.default_rng(0).integers(1, 12, 120).tolist()


def test_room_kept_for_short_outputs_is_for_short_outputs(models):
    assert serve(models, "reserve", SHORT) == (3, 0)
    most_running, preemptions = serve(models, "expected", SHORT)
    assert most_running >= 6
    assert preemptions <= 3
    assert serve(models, "optimistic", SHORT)[1] > preemptions


@pytest.mark.parametrize("outputs", [[60] * 40, [300] * 10], ids=["long", "too few"])
def test_room_kept_for_long_outputs_is_all(models, outputs):
    assert serve(models, "expected", outputs) == (3, 0)


def test_outputs_that_become_longer_are_all_served(models):
    _, preemptions = serve(models, "expected", SHORT[:40] + [60] * 40)
    assert preemptions > 0
