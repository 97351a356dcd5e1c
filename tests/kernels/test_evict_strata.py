"""Evictions that keep as many tokens of each part of the text: who survives, and the positions."""

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

DIVIDES = EvictionParameters(
    40, 8, 15, smoothing=1, sampling="greedy", protect_by="distinctness", strata=3
)
FIRST = DIVIDES.budget + DIVIDES.window
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def case(parameters: EvictionParameters = DIVIDES, evictions: int = 2, **changes: object) -> Case:
    """One sequence, after so many evictions."""
    return Case(parameters, (after_evictions(evictions, parameters),), **changes)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_dtype(dtype, layout):
    check(case(dtype=dtype, layout=layout))


@pytest.mark.parametrize("evictions", [0, 1, 7])
@pytest.mark.parametrize(("strata", "memory"), [(2, 0.9), (4, 0.0), (8, 0.9)])
def test_first_and_later_evictions(strata, memory, evictions):
    check(case(replace(DIVIDES, strata=strata, memory=memory), evictions))


@pytest.mark.parametrize(("extra", "memory"), [(8, 0.0), (47, 0.9), (400, 0.0)])
def test_long_first_eviction(extra, memory):
    """Candidates above the budget survive, and take their positions along when they move."""
    first = FIRST + extra
    parameters = replace(DIVIDES, memory=memory)
    check(Case(parameters, (Sequence(first, first),), num_kv_heads=1))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_shapes(data):
    """Any number of strata, tokens that cannot be divided evenly, none left to divide."""
    window = data.draw(st.sampled_from([2, 5, 8, 32]))
    rest = data.draw(st.sampled_from([0, 1, 2, 31, 290]))
    sinks = data.draw(st.integers(0, 3))
    protected = sinks + data.draw(st.integers(0, 5))
    parameters = replace(
        DIVIDES,
        budget=window + protected + rest + (protected + rest == 0),
        window=window,
        protected=protected,
        sinks=sinks,
        strata=data.draw(st.integers(2, window)),
    )
    check(
        case(
            parameters,
            data.draw(st.integers(0, 2)),
            head_size=data.draw(st.sampled_from([64, 96])),
            group_size=data.draw(st.sampled_from([1, 3])),
            block_size=data.draw(st.sampled_from([16, 32])),
            dtype=data.draw(st.sampled_from(DTYPES)),
            num_kv_heads=1,
            seed=data.draw(st.integers(0, 1000)),
        )
    )


@pytest.mark.parametrize("budget", [1100, 4700], ids="budget={}".format)
def test_more_candidates_than_a_step_looks_at(budget):
    """And, of 4700, more than a search holds in registers."""
    parameters = replace(DIVIDES, budget=budget, strata=4)
    check(case(parameters, num_kv_heads=1, group_size=1, separated=False))


def test_smoothing_and_temperature():
    check(case(replace(DIVIDES, smoothing=5, temperature=3.0)))


def test_ragged_batch():
    check(Case(DIVIDES, ragged(DIVIDES, 24, 60), layers=(7,), num_splits=2))


def test_sequences_with_budgets_of_their_own():
    """In one launch."""
    check(Case(DIVIDES, budgets_of_their_own(DIVIDES), num_kv_heads=1))


def test_more_heads_than_the_scratch_memory_holds():
    sequences = tuple(Sequence(FIRST, FIRST + 8, key) for key in (1, 2, 3))
    # 12 heads in room for 5: three parts.
    words = 4 * 48 + 2 * 16 + 64 + 8 * 64 + 1
    changes = dict(scratch_bytes=5 * 4 * words + 16, num_splits=1)
    check(Case(DIVIDES, sequences, layers=(1, 2), **changes))


@pytest.mark.parametrize("evictions", [0, 2])
def test_attention_that_is_not_finite(evictions):
    """All is NaN and equal: the lower slots of each stratum are kept, and nothing is overrun."""

    def fill(keys, values, queries):
        queries[:] = torch.nan

    check(case(fill=fill, evictions=evictions, separated=False, num_kv_heads=1))


def test_strata_decide():
    """So the tests above can fail: with two strata other tokens survive than with three."""
    pools = [Pool(case(replace(DIVIDES, strata=strata), evictions=0)) for strata in (3, 2)]
    before = [one.caches[0].clone() for one in pools]
    torch.testing.assert_close(*before, rtol=0, atol=0, equal_nan=True)
    for one in pools:
        one.evict()
    slots = torch.arange(DIVIDES.budget)
    kept, other = (one.caches[0][one.blocks(0, slots), :, slots % 16] for one in pools)
    assert not torch.equal(kept, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(strata=0), r"strata must be in \[1, window\], got 0"),
        (dict(strata=9), r"strata must be in \[1, window\], got 9"),
        (dict(protect_by="value_range"), "strata must be 1 with protect_by 'value_range'"),
    ],
)
def test_parameters_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(DIVIDES, **changes)
