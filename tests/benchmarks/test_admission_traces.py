"""Traces, and what the simulated rules of admission do with them."""

import numpy as np
import pytest

from benchmarks.predictions.admission import simulate
from benchmarks.predictions.admission.traces import KINDS, MAX_TOKENS, make_trace


@pytest.mark.parametrize("name", KINDS)
def test_a_trace_is_the_same_again_and_its_outputs_end_in_time(name):
    trace = make_trace(name, 500, seed=3)
    assert len(trace) == 500
    assert trace == make_trace(name, 500, seed=3)
    assert trace != make_trace(name, 500, seed=4)
    assert all(1 <= arrival.output_len <= MAX_TOKENS for arrival in trace)
    assert [a.seconds for a in trace] == sorted(a.seconds for a in trace)


def test_what_a_trace_says_of_its_future():
    halves = np.split(np.array([a.output_len for a in make_trace("short, then long", 400, 0)]), 2)
    assert 5 * np.median(halves[0]) < np.median(halves[1])
    bursts = make_trace("bursts of short and of long ones", 200, 0)
    assert len({arrival.seconds for arrival in bursts}) == 4
    tail = np.array([arrival.output_len for arrival in make_trace("heavy tail", 2000, 0)])
    assert np.median(tail) < 200 < tail.mean() < tail.max()


@pytest.fixture(scope="module")
def outcomes():
    """Of a trace that is too large for memory at once, under all rules."""
    return {
        cache: simulate.simulate(cache, "short, then long", 160, seed=0)
        for cache in ("full", "reserve", "optimistic")
    }


def test_every_token_is_computed_and_only_what_was_preempted_again(outcomes):
    wanted = sum(arrival.output_len for arrival in make_trace("short, then long", 160, 0))
    assert {outcome.tokens for outcome in outcomes.values()} == {wanted}
    assert outcomes["reserve"].preempted == outcomes["reserve"].recomputed == 0
    assert outcomes["full"].preempted > 0
    assert outcomes["full"].recomputed > 0
    assert 48 <= outcomes["reserve"].most_running < outcomes["optimistic"].most_running


def test_the_page_compares_with_the_full_cache(outcomes):
    rows = [
        {"trace": "short, then long", "cache": cache, **vars(outcome)}
        for cache, outcome in outcomes.items()
    ]
    text = simulate.page({"command": "c", "date": "d", "requests": 160, "rows": rows})
    assert "| short, then long | full |" in text
    assert "| 1.00 |" in text
    assert "| reserve |" in text
