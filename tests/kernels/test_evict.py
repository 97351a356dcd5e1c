"""The Triton eviction against the plain-torch reference: every byte of every page."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.paged_case import Case, Pool, Sequence, check, one_for_each
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.layout.block_table_row import BlockTableRow

SMALL = EvictionParameters(budget=40, window=8, protected=10)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def due(parameters: EvictionParameters, key: int = 12345) -> Sequence:
    """A sequence at its fourth eviction: T + W cached tokens."""
    first = parameters.budget + parameters.window
    return Sequence(first, first + 3 * parameters.window, key)


def case(parameters: EvictionParameters, **changes: object) -> Case:
    return Case(parameters, (due(parameters),), **changes)


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_dtype_sampling(dtype, layout, sampling):
    parameters = replace(SMALL, sampling=sampling)
    check(case(parameters, dtype=DTYPES[dtype], layout=layout))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256], ids="D={}".format)
def test_head_size(head_size, dtype):
    check(case(SMALL, head_size=head_size, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128], ids="block={}".format)
def test_block_size(block_size, layout):
    check(case(SMALL, block_size=block_size, layout=layout))


@pytest.mark.parametrize("group_size", [1, 3, 4, 5, 7, 8, 12, 16], ids="G={}".format)
def test_group_size(group_size):
    check(case(SMALL, group_size=group_size, num_kv_heads=1))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_query_rows_in_several_chunks(dtype):
    """G * W = 320, more rows than one program takes: launches add up the scores.

    In fp16 two, which share the values evenly; in fp32 ten, of which the last two have none.
    """
    parameters = EvictionParameters(budget=90, window=64, protected=8)
    check(case(parameters, group_size=5, num_kv_heads=1, dtype=DTYPES[dtype], num_splits=2))


@pytest.mark.parametrize("budget", [9, 63, 65, 257, 500, 1025], ids="T={}".format)
def test_odd_budget(budget):
    protected = min(budget // 4, budget - 8)
    parameters = EvictionParameters(budget, 8, protected, sinks=min(4, protected))
    check(case(parameters, num_kv_heads=1))


@pytest.mark.parametrize("window", [1, 5, 13, 32], ids="W={}".format)
def test_odd_window(window):
    check(case(EvictionParameters(70, window, 12), num_kv_heads=1))


@pytest.mark.parametrize("smoothing", [1, 3, 5, 9], ids="smoothing={}".format)
def test_smoothing(smoothing):
    check(case(replace(SMALL, smoothing=smoothing, sampling="greedy")))


@pytest.mark.parametrize("temperature", [0.25, 3.0], ids="temperature={}".format)
def test_temperature(temperature):
    check(case(replace(SMALL, temperature=temperature, sampling="greedy")))


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
@pytest.mark.parametrize(
    ("protected", "sinks"), [(0, 0), (4, 4), (32, 4), (32, 0), (31, 1)], ids=str
)
def test_protected_and_sinks(protected, sinks, sampling):
    check(case(replace(SMALL, protected=protected, sinks=sinks, sampling=sampling)))


@pytest.mark.parametrize("extra", [0, 47], ids="first={}+T+W".format)
def test_snapkv(extra):
    """The largest attention and the sinks: value ranges, however large, protect no other."""

    def fill(keys, values, queries):
        values[::3, 0] = 100.0

    parameters = replace(SMALL, protected=SMALL.sinks, sampling="greedy")
    first = parameters.budget + parameters.window + extra
    check(Case(parameters, (Sequence(first, first),), fill=fill))


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
def test_sequences_with_budgets_of_their_own(sampling):
    """One launch: a kept prompt of 30 and of 101 tokens, half the budget, the server's own."""
    server = replace(SMALL, sampling=sampling)
    own = [
        replace(server, budget=40 + 30, sinks=30, protected=30 + 6),
        replace(server, budget=40 + 101, sinks=101, protected=101 + 6),
        replace(server, budget=20, protected=5),
        None,
    ]
    check(Case(server, one_for_each(own, server), layers=(3, 5)))


@pytest.mark.parametrize("num_splits", [1, 2, 5, 16], ids="splits={}".format)
def test_splits(num_splits):
    parameters = EvictionParameters(300, 16, 75)
    check(case(parameters, num_splits=num_splits, num_kv_heads=1))


@pytest.mark.parametrize("sampling", ["greedy", "gumbel"])
@pytest.mark.parametrize("extra", [8, 40, 47, 400], ids="first={}+T+W".format)
def test_long_first_eviction(extra, sampling):
    parameters = replace(SMALL, sampling=sampling)
    first = parameters.budget + parameters.window + extra
    check(Case(parameters, (Sequence(first, first),)))


def test_ragged_batch():
    first = SMALL.budget + SMALL.window
    sequences = (
        Sequence(first, first, key=1),
        Sequence(first + 24, first + 24, key=2),
        Sequence(first, first + 5 * SMALL.window, key=3),
        Sequence(first + 160, first + 160 + SMALL.window, key=2**31 - 1),
    )
    check(Case(SMALL, sequences, layers=(0, 7, 35), num_splits=2))


def test_rows_that_are_not_due_are_left_alone():
    first = SMALL.budget + SMALL.window
    sequences = (
        Sequence(first, first - 1),
        Sequence(first, first + 1),
        Sequence(first, first + SMALL.window),
        Sequence(first, first + SMALL.window - 1),
        Sequence(first + 8, first),
    )
    check(Case(SMALL, sequences))


def test_padding_rows_evict_nothing_and_write_nothing():
    pool = Pool(Case(SMALL, (due(SMALL), due(SMALL))))
    pool.block_table[0, 0] = 0
    pool.block_table[1] = 0
    before = [cache.clone() for cache in pool.caches]
    pool.evict()
    for cache, old in zip(pool.caches, before, strict=True):
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)


def test_only_the_rows_that_are_passed():
    pool = Pool(Case(SMALL, (due(SMALL, 1), due(SMALL, 2), due(SMALL, 3))))
    before, (expected,) = pool.caches[0].clone(), pool.expected()[0]
    pool.evict(rows=[2])
    table = pool.block_table[:, BlockTableRow.NUM_HEADER :].long()
    torch.testing.assert_close(pool.caches[0][table[:2]], before[table[:2]], equal_nan=True)
    torch.testing.assert_close(pool.caches[0][table[2]], expected[table[2]], equal_nan=True)


def test_more_heads_than_the_scratch_memory_holds():
    sequences = (due(SMALL, 1), due(SMALL, 2), due(SMALL, 3))
    # 12 heads of 8 * (48 candidates + 1 split of 16 query rows) bytes in room for 5: three parts.
    changes = dict(scratch_bytes=5 * 512 + 16, num_splits=1)
    check(Case(SMALL, sequences, layers=(1, 2), **changes))


def test_draws_do_not_depend_on_the_batch():
    """The same request alone, and between others, in another row and at other blocks."""

    def survivors(sequences: tuple[Sequence, ...], row: int, splits: int) -> torch.Tensor:
        def fill(keys, values, queries):
            generator = torch.Generator().manual_seed(len(keys))
            for tensor in (keys, values, queries):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

        pool = Pool(Case(SMALL, sequences, fill=fill, seed=row, num_splits=splits))
        pool.evict()
        slots = torch.arange(SMALL.budget)
        return pool.caches[0][pool.blocks(row, slots), :, slots % 16]

    mine = due(SMALL, key=99)
    alone = survivors((mine,), 0, 1)
    assert torch.equal(alone, survivors((due(SMALL, 1), due(SMALL, 2), mine), 2, 2))
    assert not torch.equal(alone, survivors((due(SMALL, key=98),), 0, 1))


def test_rank_of_a_tensor_parallel_group_draws_as_the_whole_model():
    """Heads 2 and 3 on a rank of their own keep what they keep beside heads 0 and 1."""

    def fill(keys, values, queries):
        generator = torch.Generator().manual_seed(5)
        for tensor in (keys, values, queries):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))

    slots = torch.arange(SMALL.budget)
    whole = Pool(case(SMALL, num_kv_heads=4, fill=fill))
    shard = Pool(case(SMALL, num_kv_heads=2, fill=fill, first_kv_head=2))
    for pool in (whole, shard):
        pool.evict()
    kept = [pool.caches[0][pool.blocks(0, slots), :, slots % 16] for pool in (whole, shard)]
    assert torch.equal(kept[0][:, 2:], kept[1])
    assert not torch.equal(kept[0][:, :2], kept[1])


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1], ids=hex)
def test_seed(seed):
    check(case(replace(SMALL, seed=seed), num_kv_heads=1))


def test_eviction_index_keys_the_draws():
    first = SMALL.budget + SMALL.window
    check(Case(SMALL, (Sequence(first, first + 100_000 * SMALL.window),), num_kv_heads=1))


def test_slot_offset_beyond_int32_in_a_large_pool():
    """A pool of more than 2**31 elements, of which only the live pages are ever touched."""
    small = Pool(Case(SMALL, (due(SMALL),), dtype=torch.bfloat16, head_size=128, num_kv_heads=1))
    expected, _ = small.expected()
    page = small.caches[0][0].numel()
    offset = 2**31 // page + 1
    pool = Pool(small.case)
    num_blocks = offset + small.caches[0].shape[0]
    large = torch.empty((num_blocks, *small.caches[0].shape[1:]), dtype=torch.bfloat16)
    assert large.numel() > 2**31
    large[offset:] = small.caches[0]
    pool.block_table[:, 2:] += offset
    pool.caches = [large]
    pool.evict()
    torch.testing.assert_close(large[offset:], expected[0], rtol=0, atol=0, equal_nan=True)
