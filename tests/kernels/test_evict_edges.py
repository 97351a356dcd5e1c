"""Ties, infinities and other scores that a sort and a threshold search could treat differently."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from triton import next_power_of_2

from tests.kernels.paged_case import Case, Pool, Sequence, check
from tests.oracle.law import chi_square_of_sets, set_probabilities
from vase_vllm.kernels.evict import SELECT_TILE
from vase_vllm.kernels.parameters import EvictionParameters

PARAMETERS = EvictionParameters(40, 8, 10, sampling="greedy", smoothing=1)
FIRST = PARAMETERS.budget + PARAMETERS.window


def check_filled(fill, parameters=PARAMETERS, first=FIRST, **changes: object) -> Pool:
    sequences = (Sequence(first, first),)
    return check(Case(parameters, sequences, fill=fill, separated=False, **changes))


def equal_scores(keys, values, queries):
    queries.zero_()


def equal_ranges(keys, values, queries):
    values.copy_(values[:1].expand_as(values))


def few_ranges(keys, values, queries):
    values.copy_(values[torch.arange(len(values)) % 3])


def everything_equal(keys, values, queries):
    queries.zero_()
    values.zero_()


@pytest.mark.parametrize("first", [FIRST, FIRST + 80], ids=["steady", "long"])
@pytest.mark.parametrize(
    "fill",
    [equal_scores, equal_ranges, few_ranges, everything_equal],
    ids=lambda fill: fill.__name__,
)
def test_ties_go_to_the_lower_slot(fill, first):
    check_filled(fill, first=first)


@pytest.mark.parametrize(
    ("budget", "protected", "first"),
    [(1100, 1000, 2008), (700, 300, 1508)],
    ids=["in registers", "from memory"],
)
def test_ties_at_the_border_of_a_tile(budget, protected, first):
    """More equal candidates go than lie in the last tile of the selection."""
    assert first - 8 - protected > (first - 8) % SELECT_TILE
    assert (first - 8 <= max(SELECT_TILE, next_power_of_2(budget))) == (budget == 1100)
    parameters = EvictionParameters(budget, 8, protected, sinks=0, sampling="greedy", smoothing=1)
    check_filled(everything_equal, parameters, first=first, num_kv_heads=1)


def test_equal_scores_with_noise():
    check_filled(equal_scores, replace(PARAMETERS, sampling="gumbel"))


def test_infinite_value_ranges():
    def fill(keys, values, queries):
        values[7::5, 3] = torch.inf
        values[9::10, 4] = -torch.inf

    check_filled(fill, num_kv_heads=1)


def test_largest_finite_values():
    def fill(keys, values, queries):
        values[11, 0], values[11, 1] = 60000.0, -60000.0

    pool = check_filled(fill, replace(PARAMETERS, protected=5), dtype=torch.float16)
    assert not pool.caches[0][pool.blocks(0, torch.tensor([11])), 0, 11].isnan().any()


def test_scores_that_underflow():
    """One key takes all the attention: every other score is 0, its logarithm -inf."""

    def fill(keys, values, queries):
        keys.zero_()
        queries.fill_(30.0)
        keys[20] = 30.0

    check_filled(fill)
    check_filled(fill, replace(PARAMETERS, sampling="gumbel"))


def test_large_logits_do_not_overflow():
    def fill(keys, values, queries):
        keys.mul_(100.0)
        queries.mul_(100.0)

    check_filled(fill, replace(PARAMETERS, smoothing=5), num_kv_heads=1, seed=3)


def test_queries_orthogonal_to_the_first_split():
    """Logits of -inf in a whole split do not make the row a NaN."""

    def fill(keys, values, queries):
        queries.abs_()
        keys[:64, 0] = -torch.inf

    parameters = EvictionParameters(130, 8, 10, sampling="greedy", smoothing=1)
    check_filled(fill, parameters, first=138, num_splits=3, num_kv_heads=1)


def test_nan_scores_keep_the_count_exact():
    """Infinite keys make NaN scores; protected tokens and the number of survivors stand."""

    def fill(keys, values, queries):
        keys[::3] = torch.inf

    sequence = Sequence(FIRST, FIRST)
    pool = Pool(Case(replace(PARAMETERS, sampling="gumbel"), (sequence,), fill=fill))
    before = pool.caches[0].clone()
    pool.evict()
    slots = torch.arange(FIRST)
    cells = [cache[pool.blocks(0, slots), :, slots % 16] for cache in (before, pool.caches[0])]
    changed = (cells[0] != cells[1]).any(-1)
    assert (changed[: PARAMETERS.budget].sum(0) == PARAMETERS.window).all()
    assert not changed[: PARAMETERS.sinks].any()


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("what", ["keys", "queries"])
def test_nan_and_infinite_activations_are_evicted_from_as_the_reference_does(
    what, number, sampling
):
    def fill(keys, values, queries):
        {"keys": keys, "queries": queries}[what][3] = number

    check_filled(fill, replace(PARAMETERS, sampling=sampling))


def test_the_keys_of_rows_with_nan_priorities_are_told():
    """Of one layer and head of the second row; a row that is not due tells nothing."""
    sequences = (
        Sequence(FIRST, FIRST, key=5),
        Sequence(FIRST, FIRST, key=6),
        Sequence(FIRST, FIRST - 1, key=7),
    )
    pool = Pool(Case(PARAMETERS, sequences))
    for row in (1, 2):
        pool.ring_vector(pool.caches[-1], row, pool.case.num_kv_heads - 1, 2, 0)[3] = torch.nan
    pool.evict()
    assert pool.nan_keys.tolist() == [-1, 6, -1]


@pytest.mark.parametrize("number", [torch.nan, torch.inf], ids=str)
def test_nan_and_infinite_values_keep_the_count_exact(number):
    """The two paths may protect different tokens of such a request, but as many of them."""

    def fill(keys, values, queries):
        values[5::3, 1] = number

    pool = Pool(Case(PARAMETERS, (Sequence(FIRST, FIRST),), fill=fill))
    before = pool.caches[0].clone()
    pool.evict()
    slots = torch.arange(FIRST)
    at = pool.blocks(0, slots), slice(None), slots % 16
    cells = [cache[at].nan_to_num(7) for cache in (before, *pool.caches)]
    changed = (cells[0] != cells[1]).any(-1)
    assert (changed[: PARAMETERS.budget].sum(0) == PARAMETERS.window).all()
    assert not changed[: PARAMETERS.sinks].any()


def test_law_of_the_draws():
    """Sets drawn follow sequential draws without replacement in proportion to attention.

    2 of 6 candidates are drawn 128 times, by 16 requests in 2 layers of 4 heads.
    """
    parameters = EvictionParameters(8, 4, 2, sinks=2, smoothing=1)
    weights = torch.tensor([1.0, 1.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])

    def fill(keys, values, queries):
        # Logits are log-weights; the sinks, slots 0 and 1, are protected whatever they score.
        queries.zero_()
        queries[..., 0] = 8.0
        keys[: len(weights), 0] = weights.log()

    counts = sets_drawn(parameters, fill)
    assert chi_square_of_sets(counts, set_probabilities(weights[2:].tolist(), 2)) > 1e-3
    assert chi_square_of_sets(counts, set_probabilities([1.0] * 6, 2)) < 1e-6


def test_law_of_the_uniform_draws():
    counts = sets_drawn(EvictionParameters(8, 4, 2, sinks=2, scoring="uniform"))
    assert chi_square_of_sets(counts, set_probabilities([1.0] * 6, 2)) > 1e-3
    assert chi_square_of_sets(counts, set_probabilities([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 2)) < 1e-6


def sets_drawn(parameters, fill=None) -> Counter[tuple[int, ...]]:
    """How often each 2 of the 6 candidates after 2 sinks survive, in 128 heads."""
    sequences = tuple(Sequence(12, 12, key) for key in range(16))
    pool = Pool(Case(parameters, sequences, num_kv_heads=4, layers=(0, 1), group_size=1, fill=fill))
    before = [cache.clone() for cache in pool.caches]
    pool.evict()
    counts: Counter[tuple[int, ...]] = Counter()
    slots = torch.arange(8)
    for row in range(len(sequences)):
        for old, new in zip(before, pool.caches, strict=True):
            at = pool.blocks(row, slots), slice(None), slots % 16
            kept = (old[at] == new[at]).all(-1)[2:]
            for head in range(4):
                counts[tuple(kept[:, head].nonzero().flatten().tolist())] += 1
    assert sum(counts.values()) == 128
    return counts
