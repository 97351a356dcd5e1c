"""Numbers that a policy keeps of each token go where the token goes."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.errors import EvictionError
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.layout.block_table_row import RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.token_state import TokenStateLayout
from vase_vllm.policies.base import Policy
from vase_vllm.policies.candidates import Candidates, DenseTokens
from vase_vllm.policies.distinct import DistinctPolicy
from vase_vllm.policies.draws import Draws
from vase_vllm.policies.h2o import H2OPolicy
from vase_vllm.policies.received import mean_received_attention
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.pages import PlainPages
from vase_vllm.worker.token_state import load_numbers, store_numbers

NUM_HEADS, HEAD_SIZE = 2, 16


class LabellingPolicy(Policy):
    """Keeps tokens at random, and two numbers of each that its key says as well."""

    name: ClassVar[str] = "labelling"
    num_numbers = property(lambda self: 2)

    def priority(self, candidates):
        raise AssertionError("the engine asks for the ranking and the numbers together")

    def rank(self, candidates, numbers):
        keys = torch.cat([candidates.keys, candidates.window_keys], dim=-1)
        kept = candidates.limits.kept
        assert (numbers is None) == (candidates.eviction_index == 0)
        if numbers is not None:
            assert numbers.shape == (len(keys), 2, candidates.num)
            assert torch.equal(numbers[..., kept:], keys[:, :2, kept : candidates.num])
            assert not numbers[..., :kept].any()
        return candidates.draws.uniform(), keys[:, :2]


def empty_cache(num_blocks: int, block_size: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "HND":
        return torch.full((num_blocks, NUM_HEADS, block_size, 2 * HEAD_SIZE), torch.nan).to(dtype)
    cache = torch.full((num_blocks, block_size, NUM_HEADS, 2 * HEAD_SIZE), torch.nan).to(dtype)
    return cache.transpose(1, 2)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=20, deadline=None)
@given(num_numbers=st.integers(1, 3), budget=st.integers(1, 300), fewer=st.integers(0, 100))
def test_numbers_are_read_as_they_were_written_and_nothing_else_is(
    layout, dtype, num_numbers, budget, fewer
):
    where = TokenStateLayout(num_numbers, budget, 16, 2 * HEAD_SIZE * dtype.itemsize)
    cache = empty_cache(where.num_blocks + 4, 16, dtype, layout)
    blocks = torch.randperm(len(cache) - 1)[: where.num_blocks] + 1
    numbers = torch.randn(NUM_HEADS, num_numbers, max(1, budget - fewer))
    store_numbers(where, cache, blocks, numbers)
    read = load_numbers(where, cache, blocks)
    assert read.shape == (NUM_HEADS, num_numbers, budget)
    assert torch.equal(read[..., : numbers.shape[-1]], numbers)
    others = torch.ones(len(cache), dtype=torch.bool)
    others[blocks] = False
    assert cache[others].isnan().all()
    # One block fewer would not do.
    cell = where.block_size * where.cell_bytes
    assert (where.num_blocks - 1) * cell < 4 * num_numbers * budget <= where.num_blocks * cell


@pytest.mark.parametrize("kept", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_move_with_their_tokens(kept, dtype):
    """Over a long first eviction and many later ones, in two layers at once."""
    budget, window, block_size, first = 40 + kept, 8, 16, 96 + kept
    config = EvictionConfig(policy=LabellingPolicy(), budget=40, window=window, sinks=2)
    num_state_blocks = config.num_state_blocks(1, block_size, HEAD_SIZE, dtype)
    ring = RingLayout(window, 1, block_size)
    assert num_state_blocks > ring.num_blocks
    spec = EvictionSpec(
        block_size=block_size,
        num_kv_heads=NUM_HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype,
        schedule=config.schedule,
        num_state_blocks=num_state_blocks,
    )
    heads = torch.arange(NUM_HEADS)
    evictor = TorchEvictor(config, spec, ring, PlainPages(), HEAD_SIZE**-0.5, heads)
    num_token_blocks = -(-first // block_size)
    ids = torch.randperm(num_token_blocks + num_state_blocks) + 1
    header = RowHeader(first, 99, budget, kept)
    row = torch.tensor([*header, *ids.tolist()], dtype=torch.int32)
    caches = {layer: empty_cache(len(ids) + 1, block_size, dtype, "HND") for layer in (0, 1)}
    for cache in caches.values():
        cache[ids[num_token_blocks:][: ring.num_blocks]] = 0

    def arrive(slots):
        """Tokens come, and the numbers that their keys begin with are theirs alone."""
        for cache in caches.values():
            tokens = torch.randn(len(slots), NUM_HEADS, 2 * HEAD_SIZE).to(dtype)
            cache[ids[slots // block_size], :, slots % block_size] = tokens

    arrive(torch.arange(first))
    assert evictor.evict(caches, row, header, first) == first - budget
    for index in range(1, 12):
        arrive(torch.arange(budget, budget + window))
        assert evictor.evict(caches, row, header, first + index * window) == window


LIMITS, NUM = EvictionLimits(budget=12, window=4, sinks=1), 12
ORDER = [14, 0, 3, 15, 1, 2, 13, 4, 6, 12, 9, 10]
"""Positions of the candidates of a second eviction, by slot."""


def candidates(eviction_index: int) -> Candidates:
    """Twelve of them, before evictions that leave as many of sixteen tokens."""
    draws = Draws(LIMITS, 1, eviction_index, NUM, [0], torch.arange(NUM_HEADS))
    keys, values = torch.randn(2, NUM_HEADS, NUM, HEAD_SIZE)
    return Candidates(
        num=NUM,
        queries=torch.randn(NUM_HEADS, 4, HEAD_SIZE),
        tokens=DenseTokens(
            keys, values, dense_window_keys=keys[:, :4], dense_window_values=values[:, :4]
        ),
        scale=0.25,
        limits=LIMITS,
        first=16,
        eviction_index=eviction_index,
        draws=draws.of_layers([0]),
    )


def test_h2o_forgets_by_its_decay_and_knows_the_newest_tokens():
    """By slots at a first eviction, and by what it has kept at the next."""
    policy = H2OPolicy(recent=6, decay=0.5)
    priority, numbers = policy.rank(candidates(0), None)
    # The next query is at position 16: of the newest six tokens four are the window.
    assert priority.isinf().nonzero()[:, 1].tolist() == [10, 11] * NUM_HEADS
    assert numbers.shape == (NUM_HEADS, 2, NUM + 4)
    assert numbers[:, 1].tolist() == [list(range(16))] * NUM_HEADS
    # Each of four queries gives 1 in all, to candidates and window.
    torch.testing.assert_close(numbers[:, 0].sum(dim=-1), torch.full((NUM_HEADS,), 4.0))

    order = torch.tensor(ORDER)
    later = candidates(1)
    fresh, _ = H2OPolicy(recent=0).rank(later, None)
    priority, after = policy.rank(later, numbers[..., order])
    torch.testing.assert_close(after[:, 0, :NUM], fresh + 0.5 * numbers[:, 0, order])
    assert after[:, 1].tolist() == [[*ORDER, 16, 17, 18, 19]] * NUM_HEADS
    assert order[priority[0].isinf()].tolist() == [14, 15]


def test_strata_go_by_the_positions_that_were_kept():
    """Of twelve candidates six are protected, and three parts keep one each of their two."""
    policy = DistinctPolicy(protected=6, strata=3)
    assert policy.num_numbers == 1
    priority, numbers = policy.rank(candidates(0), None)
    assert numbers.tolist() == [[[float(p) for p in range(16)]]] * NUM_HEADS
    later = candidates(1)
    order = torch.tensor(ORDER)
    priority, after = policy.rank(later, numbers[..., order])
    assert after.tolist() == [[[*map(float, ORDER), 16.0, 17.0, 18.0, 19.0]]] * NUM_HEADS
    attention = later.attention()
    for of_head, own in zip(priority, attention, strict=True):
        rest = of_head.isfinite().nonzero().flatten()
        assert len(rest) == 6
        by_position = sorted(rest.tolist(), key=lambda slot: ORDER[slot])
        pairs = [by_position[index : index + 2] for index in (0, 2, 4)]
        best = {max(pair, key=lambda slot: float(own[slot])) for pair in pairs}
        assert (
            set(of_head.masked_fill(of_head.isinf(), -torch.inf).topk(3).indices.tolist()) == best
        )


def test_remembered_attention_is_a_mean_over_queries_that_fades():
    first = mean_received_attention(candidates(0), None, 0.5)
    assert first[:, 1].tolist() == [[4.0] * NUM + [4, 3, 2, 1]] * NUM_HEADS
    later = candidates(1)
    after = mean_received_attention(later, first[..., ORDER], 0.5)
    fresh = mean_received_attention(later, None, 0.5)
    torch.testing.assert_close(after[..., :NUM], fresh[..., :NUM] + 0.5 * first[..., ORDER])
    torch.testing.assert_close(after[..., NUM:], fresh[..., NUM:])
    # Whoever came last has been seen by one query of the first window, and by four since.
    assert after[0, 1, ORDER.index(15)] == 0.5 + 4


def test_numbers_of_a_wrong_shape_are_refused(monkeypatch):
    config = EvictionConfig(policy=LabellingPolicy(), budget=12, window=4, sinks=1)
    evictor = TorchEvictor(config, None, None, None, 1.0, None)
    wrong = torch.zeros(NUM_HEADS, 2, NUM)
    monkeypatch.setattr(
        LabellingPolicy, "rank", lambda self, c, numbers: (c.draws.uniform(), wrong)
    )
    with pytest.raises(EvictionError, match=r"labelling: numbers must have the shape \(2, 2, 16\)"):
        evictor.survivors(candidates(0))


def test_without_memory_nothing_is_kept():
    later = candidates(1)
    settings = {"protected": 3, "smoothing": 1}
    forgets, remembers = DistinctPolicy(**settings), DistinctPolicy(**settings, memory=0.9)
    assert (forgets.num_numbers, remembers.num_numbers) == (0, 2)
    assert forgets.rank(later, None)[1] is None
    assert remembers.rank(later, None)[1].shape == (NUM_HEADS, 2, NUM + 4)
    with pytest.raises(ValueError, match="set smoothing 1 or memory 0"):
        DistinctPolicy(memory=0.9, smoothing=5).check(LIMITS)
