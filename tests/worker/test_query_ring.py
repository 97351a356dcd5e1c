"""Which of a step's queries enter the ring."""

import numpy as np
import pytest

from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.worker.query_ring import TorchRingWrite

FIRST, WINDOW = 40, 8


@pytest.mark.parametrize(
    ("first", "positions", "expected"),
    [
        (FIRST, [], None),
        (0, [0, 1], None),
        (FIRST, [30, 31], None),
        (FIRST, [31, 32, 33], [1, 2]),
        (FIRST, [33, 34], "all"),
    ],
    ids=["no tokens", "padding", "no eviction near", "the last two", "all"],
)
def test_only_queries_that_an_eviction_asks_for_are_stored(first, positions, expected):
    layout = RingLayout(WINDOW, 2, 16)
    row = np.array([[first, 0, 32, 0, *range(1, 12)]], dtype=np.int32)
    seq_lens = np.array([max(positions, default=0) + 1])
    positions = np.array(positions, dtype=np.int64)
    write = TorchRingWrite.plan(layout, row, np.zeros_like(positions), positions, seq_lens)
    if expected is None:
        assert write is None
        return
    stored = range(len(positions)) if write.tokens is None else write.tokens.tolist()
    assert list(stored) == (list(range(len(positions))) if expected == "all" else expected)
    assert len(write.blocks) == len(write.entries) == len(stored)
