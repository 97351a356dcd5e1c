"""What is expected of running requests, against the plain statistics of the same lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.simulated_worker import Simulation, make_scheduler
from vase_vllm.engine import block_manager
from vase_vllm.engine.admission import (
    MARGIN,
    NUM_NEEDED,
    NUM_REMEMBERED,
    SLACK,
    OutputLengths,
    expected_peak,
)

# Length, and whether it was cut off there.
lengths = st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=80)
running = st.lists(st.integers(0, 60), min_size=1, max_size=8)


def remember(lengths):
    outputs = OutputLengths()
    for length, cut_off in lengths:
        outputs.add(length, cut_off)
    return outputs


def survival(lengths, running, so_far, ahead):
    """The product-limit estimator, length by length."""
    if sum(length > so_far for length, _ in lengths) < NUM_NEEDED:
        return 1.0
    probability = 1.0
    for end in range(so_far + 1, so_far + ahead + 1):
        num_ended = sum(length == end and not cut_off for length, cut_off in lengths)
        num_observed = sum(length >= end for length in [*(n for n, _ in lengths), *running])
        probability *= 1 - num_ended / max(num_observed, 1)
    return probability


@given(lengths, running, st.integers(0, 60))
def test_survival_is_the_product_limit_estimate(lengths, running, ahead):
    found = remember(lengths).survival(np.array(running), np.array([ahead]))
    wanted = [survival(lengths, running, so_far, ahead) for so_far in running]
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-9, atol=1e-12)


def test_what_still_runs_is_not_taken_for_short():
    """20 outputs have ended within 10 tokens, and 60 run on: most outputs are long."""
    outputs = remember([(1 + index % 10, False) for index in range(20)] + [(40, False)] * 16)
    without = outputs.survival(np.array([0]), np.array([10]))[0, 0]
    beside = outputs.survival(np.array([0] + [30] * 60), np.array([10]))[0, 0]
    assert without < 0.5 < 0.75 < beside


def test_old_outputs_are_forgotten():
    half = [(10, False)] * (NUM_REMEMBERED // 2)
    outputs = remember([(1000, False)] * NUM_REMEMBERED + half)
    # One more has been observed, which has just begun.
    survival = outputs.survival(np.array([0]), np.array([500]))
    assert survival[0, 0] == pytest.approx(0.5)
    for length, cut_off in half:
        outputs.add(length, cut_off)
    survival = outputs.survival(np.array([0]), np.array([9, 500]))
    np.testing.assert_allclose(survival, [[1, 0]], atol=1e-12)


@given(
    lengths,
    st.lists(
        st.tuples(
            st.integers(1, 30),
            st.integers(0, 40),
            st.integers(1, 60),
            st.integers(0, 20),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([1, 4, 16]),
)
def test_the_peak_is_no_more_than_the_worst_and_no_less_than_now(lengths, requests, block_size):
    """Where none of the last tokens' queries is kept, a sequence never comes to have a ring."""
    columns = (np.array(column) for column in zip(*requests, strict=True))
    num_prompt, so_far, ahead, num_kept, state = columns
    most = num_prompt + so_far + ahead
    first_query, complete = most - num_kept, state + -(-most // block_size)

    def blocks_after(num_tokens):
        tokens = np.minimum(num_prompt + so_far + num_tokens, most)
        blocks = np.where(tokens > first_query, complete, -(-tokens // block_size))
        return blocks * (num_tokens <= ahead + SLACK)

    peak = expected_peak(
        remember(lengths),
        num_prompt=num_prompt,
        so_far=so_far,
        remaining=ahead,
        first=most,
        first_query=first_query,
        num_complete=complete,
        block_size=block_size,
    )
    assert peak >= blocks_after(0).sum()
    worst = max(blocks_after(t).sum() for t in range(ahead.max() + 1))
    if len(lengths) < NUM_NEEDED:
        # Whoever may run on is taken to do so; the grid is finer than a block here.
        assert peak == worst
    # At the first and the last moment, the whole list of remembered lengths says the same.
    for t in {0, int(ahead.max())}:
        runs = np.array([survival(lengths, so_far.tolist(), n, t) for n in so_far.tolist()])
        blocks = blocks_after(t)
        margin = MARGIN * np.sqrt((runs * (1 - runs) * blocks**2).sum())
        assert peak >= (runs * blocks).sum() + margin - 1e-6


def serve(models, admission, outputs, pool=3):
    """Requests without a length of their own, in a pool for a few sequences at their bound.

    Returns:
        Most that ran at once, and preemptions.
    """
    eviction = {"budget": 24, "window": 8, "sinks": 1, "admission": admission}
    simulation = Simulation(make_scheduler(models.qwen3(), eviction, 4, pool * 9 + 1, chunk=64))
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
    assert serve(models, "reserve", SHORT, pool=2) == (2, 0)
    most_running, preemptions = serve(models, "expected", SHORT, pool=2)
    assert most_running >= 6
    assert preemptions <= 3
    assert serve(models, "optimistic", SHORT, pool=2)[1] > preemptions


@pytest.mark.parametrize("outputs", [[60] * 40, [300] * 10], ids=["long", "too few"])
def test_room_kept_for_long_outputs_is_all(models, outputs):
    assert serve(models, "expected", outputs) == (3, 0)


def test_outputs_that_become_longer_are_all_served(models):
    _, preemptions = serve(models, "expected", SHORT[:40] + [60] * 40)
    assert preemptions > 0


def test_what_was_expected_of_an_admitted_request_is_not_worked_out_again(models, monkeypatch):
    """Its prompt's blocks go into the prefix cache if there is room beside what is expected."""
    eviction = {"budget": 24, "window": 8, "sinks": 1, "admission": "expected"}
    scheduler = make_scheduler(models.qwen3(), eviction, 4, 6 * 9 + 1, chunk=64)
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    num_calls = 0

    def counted(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        return expected_peak(*args, **kwargs)

    monkeypatch.setattr(block_manager, "expected_peak", counted)
    simulation = Simulation(scheduler)
    for number in range(1, 4):
        simulation.add(str(number), [10 + number] * 9, max_tokens=400, stops_at=20)
        simulation.step()
        assert num_calls == number
        answer = manager._num_blocks_promised()
        assert num_calls == number
        manager._latest_expectation.forget()
        assert answer == manager._num_blocks_promised()
        num_calls = number
    # The one that asks next is another one.
    manager._latest_expectation.admitted("other", 1)
    manager._num_blocks_promised()
    assert num_calls == 4
