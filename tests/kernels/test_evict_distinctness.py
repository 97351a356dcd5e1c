"""Evictions that protect by distinctness: the numbers themselves, and who survives by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.kernels.paged_case import Case, Pool, Sequence, check, one_for_each, ragged
from tests.oracle.policies import distinctness as squared_length
from vase_vllm.kernels.launch import HEAD_SIZES, INTERPRETER_LIMITS, DeviceLimits
from vase_vllm.kernels.launch import distinctness_tile as tile_of
from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.torch_distinctness import distinctness

DISTINCT = EvictionParameters(40, 8, 15, smoothing=1, sampling="greedy", protect_by="distinctness")
FIRST = DISTINCT.budget + DISTINCT.window
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def due(parameters: EvictionParameters, extra: int = 0, key: int = 12345) -> Sequence:
    first = parameters.budget + parameters.window + extra
    return Sequence(first, first, key)


def case(parameters: EvictionParameters = DISTINCT, extra: int = 0, **changes: object) -> Case:
    return Case(parameters, (due(parameters, extra),), **changes)


# The numbers


def kernels_numbers(pool: Pool) -> torch.Tensor:
    """What the kernels protect the candidates of a pool's only sequence and layer by: [H, n]."""
    *before, selection = pool.eviction().launches(INTERPRETER_LIMITS)
    for launch in before:
        launch.run()
    ordered = selection.arguments["ordered"].numpy().view(np.uint32)
    # From ordered bits back to floats: all bits of a number below 0 are turned.
    bits = np.where(ordered >> 31 == 1, ordered ^ np.uint32(1 << 31), ~ordered)
    numbers = torch.from_numpy(bits.view(np.float32)).view(pool.case.num_kv_heads, -1)
    return numbers[:, : num_candidates(pool)]


def num_candidates(pool: Pool) -> int:
    return pool.case.num_cached(pool.case.sequences[0]) - pool.case.parameters.window


def tokens(pool: Pool) -> tuple[torch.Tensor, ...]:
    """Keys and values of the candidates [H, n, D], and of the window [H, W, D]: fp32."""
    slots = torch.arange(pool.case.num_cached(pool.case.sequences[0]))
    cells = pool.caches[0][pool.blocks(0, slots), :, slots % pool.case.block_size]
    parts = cells.transpose(0, 1).float().tensor_split([num_candidates(pool)], dim=1)
    return tuple(vectors for part in parts for vectors in part.chunk(2, dim=-1))


def by_definition(pool: Pool) -> torch.Tensor:
    """The same from the matrix of all similarities and the principal axes, in fp64: [H, n]."""
    keys, values, window_keys, sample = (part.double() for part in tokens(pool))
    units, window_units = normalize(keys, dim=-1), normalize(window_keys, dim=-1)
    similarity = (units @ window_units.transpose(1, 2)).mean(dim=-1)
    ridge = pool.case.parameters.ridge
    squares = [squared_length(*of_head, ridge) for of_head in zip(values, sample, strict=True)]
    ranges = values.amax(dim=-1) - values.amin(dim=-1)
    return (1 - similarity) * ranges * torch.stack(squares).double().sqrt()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_numbers_are_those_of_the_definition(data):
    """Values along few directions, so that the whitening has something to shorten."""
    window = data.draw(st.sampled_from([1, 3, 8, 17, 33]))
    head_size = data.draw(st.sampled_from([64, 96, 128]))
    rank = data.draw(st.integers(1, 20))
    offset = data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))

    def fill(keys, values, queries):
        directions = torch.randn(rank, head_size)
        values.mul_(0.05).add_(torch.randn(len(values), rank) @ directions)
        keys.add_(offset * torch.randn(head_size))

    ridge = data.draw(st.sampled_from([0.1, 2.0]))
    dtype = data.draw(st.sampled_from(DTYPES))
    parameters = replace(DISTINCT, window=window, budget=window + 20, ridge=ridge)
    pool = Pool(
        case(
            parameters,
            data.draw(st.sampled_from([0, 1, 60])),
            head_size=head_size,
            dtype=dtype,
            num_splits=data.draw(st.sampled_from([1, 2, 3])),
            fill=fill,
        )
    )
    found, expected = kernels_numbers(pool), by_definition(pool)
    assert found[:, : parameters.sinks].isnan().all(), "above every number"
    found, expected = (of_heads[:, parameters.sinks :].float() for of_heads in (found, expected))
    # The difference of squares loses up to D / ridge of the digits that the basis has.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    atol = tolerance * expected.mean().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


def test_a_basis_of_one_bf16_number_each_would_not_do():
    """In two parts it has the digits that the difference of squares needs, in one it has not."""

    def fill(keys, values, queries):
        # Nearly all of every value lies along a direction that the window has.
        values.mul_(0.05)
        values += 2.0 * torch.randn(len(values), 1)

    torch.manual_seed(2)
    pool = Pool(case(fill=fill, dtype=torch.bfloat16, num_kv_heads=4))
    expected = by_definition(pool)[:, DISTINCT.sinks :]

    def error(numbers):
        return (numbers[:, DISTINCT.sinks :] / expected - 1).abs().max()

    keys, values, window_keys, sample = tokens(pool)
    whole = distinctness(
        keys.transpose(1, 2), values, window_keys.transpose(1, 2), sample, DISTINCT.ridge
    )
    rounded = whole / lengths(values, sample) * lengths(values, sample, torch.bfloat16)
    assert error(whole) < 1e-3
    assert error(kernels_numbers(pool)) < 1e-2
    assert error(rounded) > 0.1


def lengths(
    values: torch.Tensor, sample: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Whitened lengths [H, n] with the basis rounded to a dtype."""
    floor = DISTINCT.ridge * sample.square().sum(dim=(1, 2))[:, None] / sample.shape[-1]
    gram = sample @ sample.transpose(1, 2) + floor[..., None] * torch.eye(sample.shape[1])
    basis = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), sample, upper=False)
    shortened = (values @ basis.to(dtype).float().transpose(1, 2)).square().sum(dim=-1)
    return ((values.square().sum(dim=-1) - shortened) / floor).clamp_min(0).sqrt()


# Who survives


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_dtype(dtype, layout):
    check(case(dtype=dtype, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES, ids="D={}".format)
def test_head_size(head_size, dtype):
    check(case(head_size=head_size, dtype=dtype, num_kv_heads=1))


@pytest.mark.parametrize("block_size", [32, 64, 128], ids="block={}".format)
def test_block_size(block_size):
    check(case(block_size=block_size))


@pytest.mark.parametrize("group_size", [1, 5, 16], ids="G={}".format)
def test_group_size(group_size):
    check(case(group_size=group_size, num_kv_heads=1))


@pytest.mark.parametrize("window", [1, 5, 13, 32, 70], ids="W={}".format)
def test_odd_window(window):
    """Of 70 the basis is read in two tiles: what the first leaves over goes on to the second."""
    check(case(EvictionParameters(**fields(budget=100, window=window)), num_kv_heads=1))


def fields(**changes: object) -> dict[str, object]:
    return dict(vars(DISTINCT)) | changes


@pytest.mark.parametrize(
    ("budget", "protected", "sinks"), [(9, 0, 0), (63, 4, 4), (65, 57, 0), (257, 96, 1)], ids=str
)
def test_odd_budget(budget, protected, sinks):
    parameters = replace(DISTINCT, budget=budget, protected=protected, sinks=sinks)
    check(case(parameters, num_kv_heads=1))


@pytest.mark.parametrize("changes", [dict(smoothing=5), dict(temperature=3.0), dict(ridge=2.0)])
def test_settings(changes):
    check(case(replace(DISTINCT, **changes)))


def test_query_rows_in_several_chunks():
    parameters = replace(DISTINCT, budget=90, window=64)
    check(case(parameters, group_size=5, num_kv_heads=1, dtype=torch.float16, num_splits=2))


@pytest.mark.parametrize("num_splits", [1, 5, 16], ids="splits={}".format)
def test_splits(num_splits):
    check(case(replace(DISTINCT, budget=300), num_splits=num_splits, num_kv_heads=1))


@pytest.mark.parametrize("extra", [8, 47, 400], ids="first={}+T+W".format)
def test_long_first_eviction(extra):
    check(case(extra=extra, num_kv_heads=1))


def test_ragged_batch():
    check(Case(DISTINCT, ragged(DISTINCT, 24, 60), layers=(0, 7), num_splits=2))


def test_sequences_with_budgets_of_their_own():
    """One launch: a kept prompt of 30 and of 101 tokens, half the budget, the server's own."""
    own = [
        replace(DISTINCT, budget=40 + 30, sinks=30, protected=30 + 9),
        replace(DISTINCT, budget=40 + 101, sinks=101, protected=101 + 9),
        replace(DISTINCT, budget=20, protected=7),
        None,
    ]
    check(Case(DISTINCT, one_for_each(own, DISTINCT), num_kv_heads=1))


def test_more_heads_than_the_scratch_memory_holds():
    sequences = tuple(due(DISTINCT, key=key) for key in (1, 2, 3))
    # 12 heads in room for 5: three parts. A head has 2 numbers for each of 48 candidates and of 16
    # query rows, the mean of the window's keys, the whitening's basis and its floor.
    words = 2 * 48 + 2 * 16 + 64 + 8 * 64 + 1
    changes = dict(scratch_bytes=5 * 4 * words + 16, num_splits=1)
    check(Case(DISTINCT, sequences, layers=(1, 2), **changes))


# Numbers that are not usual


def check_filled(fill, **changes: object) -> Pool:
    return check(case(fill=fill, separated=False, **changes))


def test_keys_and_window_values_of_zeros():
    def fill(keys, values, queries):
        keys[5::4] = 0
        keys[-2] = 0
        values[-DISTINCT.window :] = 0

    check_filled(fill)


def test_values_of_zeros_tie_and_the_lower_slot_is_kept():
    def fill(keys, values, queries):
        values[::2] = 0
        queries.zero_()

    check_filled(fill)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_window_keys_and_values_that_are_not_finite_have_no_part(number):
    def fill(keys, values, queries):
        values[-3, 5] = number
        values[-1] = number
        keys[-4, 3] = number

    check_filled(fill)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("what", ["keys", "values", "queries"])
def test_activations_that_are_not_finite_are_evicted_from_as_the_reference_does(what, number):
    def fill(keys, values, queries):
        if what == "queries":
            queries[3, 1, 7] = number
        else:
            # Not a sink.
            {"keys": keys, "values": values}[what][9, 7] = number

    check_filled(fill)


def test_parameters_that_do_not_go_together():
    with pytest.raises(ValueError, match="protect_by must be 'value_range' with scoring 'uniform'"):
        EvictionParameters(40, 8, 4, scoring="uniform", protect_by="distinctness")
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        replace(DISTINCT, ridge=0)


# The tile


@pytest.mark.parametrize("shared_memory", [227, 163, 99], ids="{} KiB".format)
@pytest.mark.parametrize("head_size", HEAD_SIZES, ids="D={}".format)
@pytest.mark.parametrize("window", [1, 64, 256], ids="W={}".format)
def test_the_basis_and_the_tiles_of_k_and_v_fit(window, head_size, shared_memory):
    limits = DeviceLimits(132, shared_memory * 1024, 9)
    tile = tile_of(window, head_size, 2, limits)
    padded = 1 << (head_size - 1).bit_length()
    # The basis in two parts, and two tiles of K and of V each.
    needed = (2 * tile.rows + 4 * tile.keys) * padded * 2
    assert needed <= limits.shared_memory
    assert tile.rows >= min(window, 64) or padded == 256
