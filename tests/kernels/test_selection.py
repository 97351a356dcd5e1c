"""Device functions of the selection on their own: top-k, order of floats, random numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.device_functions import draw, top_k
from vase_vllm.kernels.philox import gumbel, philox_word


def select(values, k, highest=(), search_tile=16):
    """Select k of the values, those at the slots ``highest`` before all others."""
    x = torch.tensor(values, dtype=torch.float32)
    # Four are read at a time.
    ordered, selected, protected = torch.zeros(3, len(x) + 3, dtype=torch.int32)
    protected[list(highest)] = 1
    top_k[(1,)](x, protected, ordered, selected, len(x), k, SEARCH_TILE=search_tile, TILE=16)
    return selected[: len(x)].bool(), ordered[: len(x)].long() & 0xFFFFFFFF


FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@pytest.mark.parametrize("search_tile", [64, 16], ids=["in registers", "from memory"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_top_k_is_a_stable_sort(search_tile, data):
    values = data.draw(st.lists(FLOATS, min_size=1, max_size=40))
    k = data.draw(st.integers(0, len(values)))
    highest = data.draw(st.sets(st.integers(0, len(values) - 1), max_size=k))
    # NaN ranks with -inf.
    ranked = torch.tensor(values).nan_to_num(-torch.inf, torch.inf, -torch.inf).double()
    ranked[ranked == torch.inf] = 2.0**200
    ranked[list(highest)] = torch.inf
    order = torch.sort(ranked, descending=True, stable=True).indices
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[:k]] = True
    assert torch.equal(select(values, k, highest, search_tile)[0], expected)


def test_order_of_floats():
    inf = float("inf")
    ascending = [-inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 3e38, inf]
    _, ordered = select(ascending, 3)
    assert ordered.tolist() == sorted(set(ordered.tolist()))
    assert ordered.min() > 0
    assert ordered.max() < 0xFFFFFFFF
    _, zeros = select([0.0, -0.0], 1)
    assert zeros[0] == zeros[1]
    _, lowest = select([-inf, float("nan"), -float("nan")], 1)
    assert len(set(lowest.tolist())) == 1


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
