"""The kinds of scoring that read no attention: uniform draws, and the newest by position."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.paged_case import Case, Pool, Sequence, check, ragged
from vase_vllm.kernels.parameters import EvictionParameters

UNIFORM = EvictionParameters(40, 8, 4, scoring="uniform")
AGE = EvictionParameters(40, 8, 4, sampling="greedy", scoring="age")
BOTH = pytest.mark.parametrize("parameters", [UNIFORM, AGE], ids=lambda p: p.scoring)
FIRST = UNIFORM.budget + UNIFORM.window
RAGGED = ragged(UNIFORM, 160, 23)


def number_the_tokens(keys, values, queries):
    keys[:, 0] = torch.arange(len(keys))


def numbers(pool, row=0, layer=0):
    """Numbers of the tokens in the slots below the budget: [H, T] int64."""
    slots = torch.arange(pool.case.parameters.budget)
    cells = pool.caches[layer][pool.blocks(row, slots), :, slots % pool.case.block_size]
    return cells[..., 0].T.long()


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@BOTH
def test_ragged_batch(parameters, dtype, layout):
    check(Case(parameters, RAGGED, dtype=dtype, layout=layout, layers=(0, 7)))


@pytest.mark.parametrize("sinks", [0, 1, 31, 32], ids="sinks={}".format)
@BOTH
def test_sinks(parameters, sinks):
    parameters = replace(parameters, protected=sinks, sinks=sinks)
    pool = check(Case(parameters, RAGGED[1:2], fill=number_the_tokens))
    assert (numbers(pool)[:, :sinks] == torch.arange(sinks)).all()


@pytest.mark.parametrize("extra", [1, 47, 400, 2000], ids="first={}+T+W".format)
@BOTH
def test_long_first_eviction(parameters, extra):
    check(Case(parameters, (Sequence(FIRST + extra, FIRST + extra),)))


@pytest.mark.parametrize(("budget", "window"), [(9, 8), (63, 5), (1025, 1), (700, 64)], ids=str)
@BOTH
def test_odd_sizes(parameters, budget, window):
    parameters = replace(parameters, budget=budget, window=window, protected=1, sinks=1)
    first = budget + window
    check(Case(parameters, (Sequence(first, first + 2 * window),), num_kv_heads=1))


@BOTH
def test_more_heads_than_the_scratch_memory_holds(parameters):
    # 12 heads of 8 * 48 bytes, for no attention is scored, in room for 5: three parts.
    sequences = tuple(Sequence(FIRST, FIRST + 8 * key, key) for key in (1, 2, 3))
    check(Case(parameters, sequences, layers=(1, 2), scratch_bytes=5 * 384 + 16))


@BOTH
def test_only_the_rows_that_are_passed(parameters):
    """A row of ``slot_priority`` belongs to a due sequence, not to a row of the block table."""
    pool = Pool(Case(parameters, RAGGED, fill=number_the_tokens))
    before, (expected,) = pool.caches[0].clone(), pool.expected()[0]
    pool.evict(rows=[4, 1])
    for row in range(len(RAGGED)):
        wanted = expected if row in (1, 4) else before
        blocks = pool.block_table[row, 2:].long()
        torch.testing.assert_close(pool.caches[0][blocks], wanted[blocks], equal_nan=True)


@pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**64 - 1], ids=hex)
def test_seed_keys_the_uniform_draws(seed):
    check(Case(replace(UNIFORM, seed=seed), RAGGED[:1], first_kv_head=6))


def test_newest_survive_many_evictions():
    """Sinks and the newest of each, without the reference, the caller keeping the positions."""
    budget, window, first = AGE.budget, AGE.window, FIRST + 24
    pool = Pool(Case(AGE, (Sequence(first, first),), layers=(0, 1), fill=number_the_tokens))
    slots = torch.arange(budget, budget + window)
    at = pool.blocks(0, slots), slice(None), slots % pool.case.block_size
    for position in range(first, first + 6 * window, window):
        pool.evict()
        newest = torch.arange(position - budget + AGE.sinks, position)
        wanted = torch.cat([torch.arange(AGE.sinks), newest])
        for layer, cache in enumerate(pool.caches):
            assert (numbers(pool, layer=layer).sort().values == wanted).all()
            cache[at] = torch.arange(position, position + window).float()[:, None, None]
        pool.arrival.fill_(2**31 - 1)
        pool.arrival[0, :budget] = numbers(pool)[0]
        pool.positions += window


def test_sequence_with_more_candidates_than_positions_is_left_alone():
    """The scratch memory, whose rows are rounded up, has room for it; ``slot_priority`` has not."""
    pool = Pool(Case(AGE, RAGGED[:2], fill=number_the_tokens))
    before = pool.caches[0].clone()
    pool.evict(rows=[0], max_num_cached=FIRST - 1)
    torch.testing.assert_close(pool.caches[0], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scoring="uniform", protected=5), r"protected must equal sinks \(4\).*'uniform'"),
        (dict(scoring="age", sampling="greedy", protected=5), "protected must equal sinks"),
        (dict(scoring="uniform", sampling="greedy"), "sampling must be 'gumbel'.*'uniform'"),
        (dict(scoring="age"), "sampling must be 'greedy'.*'age'"),
    ],
    ids=str,
)
def test_parameters_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        EvictionParameters(**(dict(budget=40, window=8, protected=4) | changes))
