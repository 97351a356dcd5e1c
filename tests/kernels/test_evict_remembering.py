"""Evictions that remember earlier ones: who survives, and the numbers that go with a token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.paged_case import (
    Case,
    Pool,
    Sequence,
    after_evictions,
    budgets_of_their_own,
    check,
    ragged,
)
from vase_vllm.kernels.parameters import EvictionParameters

REMEMBERS = EvictionParameters(
    40, 8, 15, smoothing=1, sampling="greedy", protect_by="distinctness", memory=0.9
)
FIRST = REMEMBERS.budget + REMEMBERS.window
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def case(parameters: EvictionParameters = REMEMBERS, evictions: int = 2, **changes: object) -> Case:
    """One sequence, after so many evictions."""
    return Case(parameters, (after_evictions(evictions, parameters),), **changes)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_dtype(dtype, layout):
    check(case(dtype=dtype, layout=layout))


@pytest.mark.parametrize("evictions", [0, 1, 7])
@pytest.mark.parametrize("memory", [0.25, 1.0])
def test_first_and_later_evictions(memory, evictions):
    check(case(replace(REMEMBERS, memory=memory), evictions))


@pytest.mark.parametrize("extra", [8, 47, 400], ids="first={}+T+W".format)
def test_long_first_eviction(extra):
    """Candidates above the budget survive, and take their numbers along when they move."""
    first = FIRST + extra
    check(Case(REMEMBERS, (Sequence(first, first),), num_kv_heads=1))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_shapes(data):
    """Numbers that fill cells and blocks in part, behind rings of any number of blocks."""
    window = data.draw(st.sampled_from([1, 5, 8, 32]))
    budget = window + data.draw(st.sampled_from([2, 31, 290]))
    parameters = replace(REMEMBERS, budget=budget, window=window, protected=1, sinks=1)
    check(
        case(
            parameters,
            data.draw(st.integers(0, 2)),
            head_size=data.draw(st.sampled_from([64, 96])),
            group_size=data.draw(st.sampled_from([1, 3, 16])),
            block_size=data.draw(st.sampled_from([16, 32])),
            dtype=data.draw(st.sampled_from(DTYPES)),
            num_kv_heads=1,
            seed=data.draw(st.integers(0, 1000)),
        )
    )


@pytest.mark.parametrize("num_splits", [1, 3, 16], ids="splits={}".format)
def test_splits(num_splits):
    """Of more candidates than a program looks at in a step."""
    parameters = replace(REMEMBERS, budget=1100)
    check(case(parameters, num_splits=num_splits, num_kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_query_rows_in_several_chunks(dtype):
    parameters = replace(REMEMBERS, budget=90, window=64)
    check(case(parameters, group_size=5, num_kv_heads=1, dtype=dtype, num_splits=2))


@pytest.mark.parametrize("window", [13, 70], ids="W={}".format)
def test_odd_window(window):
    """Of 70 the window's own scores take two tiles."""
    parameters = replace(REMEMBERS, budget=100, window=window)
    check(case(parameters, num_kv_heads=1, num_splits=2))


def test_temperature():
    check(case(replace(REMEMBERS, temperature=3.0)))


def test_ragged_batch():
    check(Case(REMEMBERS, ragged(REMEMBERS, 24, 60), layers=(0, 7), num_splits=2))


def test_sequences_with_budgets_of_their_own():
    """In one launch."""
    check(Case(REMEMBERS, budgets_of_their_own(REMEMBERS), num_kv_heads=1))


def test_more_heads_than_the_scratch_memory_holds():
    sequences = tuple(Sequence(FIRST, FIRST + 8, key) for key in (1, 2, 3))
    # 12 heads in room for 5: three parts.
    words = 4 * 48 + 16 + 2 * 16 + 64 + 8 * 64 + 1
    changes = dict(scratch_bytes=5 * 4 * words + 16, num_splits=1)
    check(Case(REMEMBERS, sequences, layers=(1, 2), **changes))


@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=str)
def test_queries_that_are_not_finite(number):
    """All attention is NaN, and stays so with the tokens that remember it."""

    def fill(keys, values, queries):
        queries[3, 1, 7] = number

    pool = check(case(fill=fill, separated=False, num_kv_heads=1))
    received, _ = pool.numbers(pool.caches[0], 0)
    # But for a token of the window that this query has not seen.
    assert received.isnan().sum() > REMEMBERS.budget - REMEMBERS.window


def test_what_is_remembered_decides():
    """So the tests above can fail: where hardly anything is remembered other tokens survive."""
    pool, forgetful = (Pool(case(replace(REMEMBERS, memory=memory))) for memory in (1.0, 1e-6))
    before = [one.caches[0].clone() for one in (pool, forgetful)]
    torch.testing.assert_close(*before, rtol=0, atol=0, equal_nan=True)
    for one in (pool, forgetful):
        one.evict()
    slots = torch.arange(REMEMBERS.budget)
    kept, other = (one.caches[0][pool.blocks(0, slots), :, slots % 16] for one in (pool, forgetful))
    assert not torch.equal(kept, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(memory=1.5), r"memory must be in \[0, 1\], got 1.5"),
        (dict(smoothing=5), "memory must be 0 with smoothing 5"),
        (
            dict(protect_by="value_range"),
            "memory must be 0 with protect_by 'value_range'",
        ),
    ],
)
def test_parameters_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(REMEMBERS, **changes)
