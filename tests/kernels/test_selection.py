"""Device functions of the selection on their own: top-k, order of floats, random numbers."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from vase_vllm.kernels.philox import gumbel, philox_word
from vase_vllm.kernels.selection import gumbel_noise, kth_largest, ordered_bits, select_tile


@triton.jit
def top_k(x, ordered, selected, length, k, TILE: tl.constexpr):
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        values = tl.load(x + slots, mask=slots < length, other=0.0)
        bits = ordered_bits(values).to(tl.int32, bitcast=True)
        tl.store(ordered + slots, bits, mask=slots < length)
    threshold, ties = kth_largest(ordered, length, k, TILE)
    seen = 0
    for start in range(0, length, TILE):
        slots = start + tl.arange(0, TILE)
        bits = tl.load(ordered + slots, mask=slots < length, other=0).to(tl.uint32, bitcast=True)
        kept, seen = select_tile(bits, slots < length, threshold, ties, seen)
        tl.store(selected + slots, kept.to(tl.int32), mask=slots < length)


def select(values, k):
    x = torch.tensor(values, dtype=torch.float32)
    ordered, selected = (torch.zeros(len(x), dtype=torch.int32) for _ in range(2))
    top_k[(1,)](x, ordered, selected, len(x), k, TILE=16)
    return selected.bool(), ordered.long() & 0xFFFFFFFF


FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_top_k_is_a_stable_sort(data):
    values = data.draw(st.lists(FLOATS, min_size=1, max_size=40))
    k = data.draw(st.integers(0, len(values)))
    order = torch.sort(torch.tensor(values), descending=True, stable=True).indices
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[:k]] = True
    assert torch.equal(select(values, k)[0], expected)


def test_order_of_floats():
    inf = float("inf")
    ascending = [-inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 3e38, inf, float("nan")]
    _, ordered = select(ascending, 3)
    assert ordered.tolist() == sorted(set(ordered.tolist()))
    assert 0 < ordered.min() and ordered.max() < 0xFFFFFFFF
    _, zeros = select([0.0, -0.0], 1)
    assert zeros[0] == zeros[1]


@triton.jit
def draw(words, noise, seed_low, seed_high, eviction, stream, key, TILE: tl.constexpr):
    slots = tl.arange(0, TILE)
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox((high << 32) | low, slots, eviction, stream, key)
    tl.store(words + slots, word.to(tl.int64))
    tl.store(noise + slots, gumbel_noise(seed_low, seed_high, slots, eviction, stream, key))


@pytest.mark.parametrize(
    ("eviction", "stream", "key"),
    [(0, 0, 0), (7, 35 * 65536 + 3, 2**31 - 1), (2**31 - 1, 2**31 - 1, 1)],
    ids=["zero", "typical", "largest"],
)
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 0xDEADBEEFCAFEF00D], ids=hex)
def test_same_numbers_as_the_reference(seed, eviction, stream, key):
    words, noise = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    low, high = ((seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
    signed = [word - 2**32 if word >= 2**31 else word for word in (low, high)]
    draw[(1,)](words, noise, *signed, eviction, stream, key, TILE=64)
    counter = (torch.arange(64), *(torch.tensor(word) for word in (eviction, stream, key)))
    assert torch.equal(words, philox_word(seed, *counter))
    torch.testing.assert_close(noise, gumbel(seed, *counter), rtol=1e-6, atol=1e-6)
