"""What is expected of running requests, against the plain statistics of the same lengths."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulated_worker import Simulation, make_scheduler
from vase_vllm.admission import NUM_NEEDED, NUM_REMEMBERED, AnswerLengths

lengths = st.lists(st.integers(1, 50) | st.just(math.inf), max_size=80)
requests = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=8)


def remember(lengths):
    answers = AnswerLengths()
    for length in lengths:
        answers.add(length)
    return answers


@given(lengths, requests)
def test_expectations_are_those_of_the_longer_answers(lengths, requests):
    so_far, most = (np.array(column) for column in zip(*requests, strict=True))
    mean, variance = remember(lengths).expect(so_far, most)
    for index, (n, cap) in enumerate(requests):
        longer = [min(length, cap) for length in lengths if length > n]
        if len(longer) < NUM_NEEDED:
            longer = [cap]
        assert math.isclose(mean[index], np.mean(longer), abs_tol=1e-9)
        assert math.isclose(variance[index], np.var(longer), abs_tol=1e-9)


def test_old_answers_are_forgotten():
    answers = remember([1000] * NUM_REMEMBERED + [10] * NUM_REMEMBERED)
    assert answers.expect(np.array([0]), np.array([5000]))[0] == [10]
    answers = remember([10] * NUM_REMEMBERED + [1000] * (NUM_REMEMBERED // 2))
    assert answers.expect(np.array([0]), np.array([5000]))[0] == [505]


def serve(models, admission, answers):
    """Requests without a length of their own, in a pool for three sequences at their bound.

    Returns:
        Most that ran at once, and preemptions.
    """
    eviction = {"budget": 24, "window": 8, "sinks": 1, "admission": admission}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, 3 * 9 + 1, chunk=64))
    for index, length in enumerate(answers):
        simulation.add(str(index), [10 + index % 7] * 3, max_tokens=400, stops_at=length)
    requests = dict(simulation.scheduler.requests)
    most_running = 0
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()
        most_running = max(most_running, len(simulation.scheduler.running))
    assert simulation.num_used_blocks == 0
    assert [requests[str(i)].num_output_tokens for i in range(len(answers))] == answers
    return most_running, sum(request.num_preemptions for request in requests.values())


SHORT = np.random.default_rng(0).integers(1, 12, 120).tolist()


def test_room_kept_for_short_answers_is_for_short_answers(models):
    assert serve(models, "reserve", SHORT) == (3, 0)
    most_running, preemptions = serve(models, "expected", SHORT)
    assert most_running >= 6
    assert preemptions <= 3
    assert serve(models, "optimistic", SHORT)[1] > preemptions


@pytest.mark.parametrize("answers", [[60] * 40, [300] * 10], ids=["long", "too few"])
def test_room_kept_for_long_answers_is_all(models, answers):
    assert serve(models, "expected", answers) == (3, 0)


def test_answers_that_become_longer_are_all_served(models):
    _, preemptions = serve(models, "expected", SHORT[:40] + [60] * 40)
    assert preemptions > 0
