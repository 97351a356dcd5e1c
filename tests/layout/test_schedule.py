"""The closed form against the authors' schedule, played token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.authors_schedule import play
from vase_vllm.layout.schedule import EvictionSchedule

shapes = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(1, 200)).map(
    lambda n: (n[0] + n[1], n[1], n[2])
)


# A bounded prefill evicts as if all of it were output.
both = pytest.mark.parametrize("bounded", [False, True], ids=["dense", "bounded"])


@both
@given(shape=shapes)
def test_closed_form_equals_the_counters(shape, bounded):
    budget, window, num_prompt = shape
    schedule = EvictionSchedule(budget, window, bounded)
    first = schedule.first_eviction(num_prompt)
    num_prompt *= not bounded
    num_tokens = first + 4 * window
    positions = torch.arange(num_tokens)
    slots = schedule.slots(positions, torch.tensor(first)).tolist()
    due = schedule.due(positions, torch.tensor(first)).tolist()
    for position, slot, evicted_at in play(budget, window, num_prompt, num_tokens):
        assert slots[position] == slot
        assert due[position] == (evicted_at is not None)
        if evicted_at is not None:
            assert schedule.num_cached(position, first) == evicted_at


@both
@given(shape=shapes, num_output=st.integers(1, 400))
def test_evictions_are_counted_as_played(shape, num_output, bounded):
    budget, window, num_prompt = shape
    # The last token of an output is never fed back: it has no position in the cache.
    played = play(budget, window, num_prompt * (not bounded), num_prompt + num_output - 1)
    sizes = [evicted_at for _, _, evicted_at in played if evicted_at is not None]
    schedule = EvictionSchedule(budget, window, bounded)
    assert schedule.evictions(num_prompt, num_output) == (
        len(sizes),
        sum(size - budget for size in sizes),
    )


@given(shape=shapes, longest=st.integers(1, 300))
def test_what_never_evicts_is_known(shape, longest):
    """Over all prompts and outputs that together have at most so many tokens."""
    budget, window, _ = shape
    schedule = EvictionSchedule(budget, window)
    counts = [schedule.evictions(n, longest - n)[0] for n in range(1, longest)]
    assert (schedule.why_nothing_evicts(longest, "--budget") is None) == any(counts)


@both
@given(shape=shapes, num_output=st.integers(1, 400))
def test_which_sequence_comes_to_evict_is_known(shape, num_output, bounded):
    budget, window, num_prompt = shape
    schedule = EvictionSchedule(budget, window, bounded)
    num_evictions, _ = schedule.evictions(num_prompt, num_output)
    assert schedule.comes_to_evict(num_prompt, num_prompt + num_output) == (num_evictions > 0)


@given(shapes)
def test_slots_stay_below_the_bound_after_the_first_eviction(shape):
    budget, window, num_prompt = shape
    schedule = EvictionSchedule(budget, window)
    first = schedule.first_eviction(num_prompt)
    assert first > num_prompt
    assert schedule.bound <= first <= max(num_prompt, budget) + window
    positions = torch.arange(first, first + 5 * window)
    slots = schedule.slots(positions, torch.tensor(first))
    assert int(slots.max()) == schedule.bound - 1
    assert schedule.num_row_blocks(first + 5 * window, first, 1, 3) == first + 3


@given(shapes, st.integers(1, 400))
def test_a_bounded_prefill_never_holds_more_than_the_bound(shape, num_tokens):
    budget, window, num_prompt = shape
    schedule = EvictionSchedule(budget, window, bounded_prefill=True)
    first = schedule.first_eviction(num_prompt)
    assert first == schedule.bound
    expected = num_tokens if num_tokens <= budget else budget + window + 3
    assert schedule.num_row_blocks(num_tokens, first, 1, 3) == expected


@both
@given(
    shape=shapes,
    num_blocks=st.integers(1, 60),
    block_size=st.sampled_from([1, 16, 20]),
    num_state_blocks=st.integers(1, 4),
)
def test_a_row_suffices_for_as_many_tokens_as_it_says(
    shape, num_blocks, block_size, num_state_blocks, bounded
):
    budget, window, num_prompt = shape
    schedule = EvictionSchedule(budget, window, bounded)
    first = schedule.first_eviction(num_prompt)
    room = schedule.num_tokens_of_row(num_blocks, first, block_size, num_state_blocks)
    longest = first + 5 * window
    required = [
        schedule.num_row_blocks(num_tokens, first, block_size, num_state_blocks)
        for num_tokens in range(1, longest + 1)
    ]
    assert min(room, longest) == sum(each <= num_blocks for each in required)


@both
@given(shape=shapes, position=st.integers(0, 300))
def test_a_chunk_never_crosses_an_eviction(shape, position, bounded):
    budget, window, num_prompt = shape
    schedule = EvictionSchedule(budget, window, bounded)
    first = schedule.first_eviction(num_prompt)
    length = schedule.tokens_until_eviction(position, first)
    assert length > 0
    inside = torch.arange(position + 1, position + length)
    assert not schedule.due(inside, torch.tensor(first)).any()
    assert schedule.due(torch.tensor(position + length), torch.tensor(first))


@pytest.mark.parametrize("num_prompt", [1, 100, 1000])
def test_padding_rows_never_evict(num_prompt):
    schedule = EvictionSchedule(64, 16)
    positions, padding = torch.arange(1000), torch.tensor(0)
    assert not schedule.due(positions, padding).any()
    assert torch.equal(schedule.slots(positions, padding), positions)
