"""The query ring's launch: which tokens enter, and where they land."""

import pytest
import torch

from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.query_ring import RingLayout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Batch:
    """A step of sequences given as (first eviction, tokens before the step, tokens in it)."""

    def __init__(
        self,
        sequences,
        window=8,
        group_size=2,
        num_kv_heads=2,
        head_size=64,
        block_size=16,
        dtype=torch.float32,
        layout="HND",
        num_padding=0,
    ):
        generator = torch.Generator().manual_seed(0)
        self.sequences, self.window, self.group_size = sequences, window, group_size
        ring = RingLayout(window, group_size, block_size)
        self.entries, self.num_state_blocks = ring.entries_per_block, ring.num_blocks
        num_rows = len(sequences)
        # Behind the token blocks of the first eviction.
        self.front = [
            BlockTableRow.NUM_HEADER - (-first // block_size) for first, _, _ in sequences
        ]
        num_columns = max(self.front) + self.num_state_blocks
        self.block_table = torch.zeros(num_rows, num_columns).int()
        num_blocks = 1 + num_rows * self.num_state_blocks
        state_blocks = torch.randperm(num_blocks - 1, generator=generator).view(num_rows, -1) + 1
        for row, front in enumerate(self.front):
            self.block_table[row, front : front + self.num_state_blocks] = state_blocks[row]
        self.block_table[:, 0] = torch.tensor([first for first, _, _ in sequences])
        shape = (num_blocks, num_kv_heads, block_size, 2 * head_size)
        self.cache = torch.full(shape, torch.nan, dtype=dtype)
        if layout == "NHD":
            self.cache = self.cache.transpose(1, 2).contiguous().transpose(1, 2)
        counts = [count for _, _, count in sequences]
        num_tokens = sum(counts) + num_padding
        self.query_start_loc = torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int()
        self.seq_lens = torch.tensor([before + count for _, before, count in sequences]).int()
        self.positions = torch.zeros(num_tokens, dtype=torch.int64)
        for row, (_, before, count) in enumerate(sequences):
            start = self.query_start_loc[row]
            self.positions[start : start + count] = before + torch.arange(count)
        # Queries are a slice of the fused projection: their token stride is larger.
        fused = torch.randn(
            num_tokens, num_kv_heads * (group_size + 2), head_size, generator=generator
        )
        self.query = fused.to(dtype)[:, : num_kv_heads * group_size]

    def store(self):
        TritonRingWrite(
            self.positions,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            window=self.window,
        ).store(self.cache, self.query)

    def expected(self):
        cache, head_size = self.cache.clone(), self.query.shape[-1]
        for row, (first, before, count) in enumerate(self.sequences):
            earliest = max(before + count, first) - self.window
            for i in range(max(0, earliest - before) if first else count, count):
                token, entry = self.query_start_loc[row] + i, (before + i) % self.window
                block = self.block_table[row, self.front[row] + entry // self.entries]
                for head in range(self.query.shape[1]):
                    kv_head, query_head = divmod(head, self.group_size)
                    vector = entry % self.entries * self.group_size + query_head
                    start = vector % 2 * head_size
                    cell = cache[block, kv_head, vector // 2]
                    cell[start : start + head_size] = self.query[token, head]
        return cache


def check(batch):
    expected = batch.expected()
    batch.store()
    torch.testing.assert_close(batch.cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, layout):
    sequences = [(8, 50, 1), (8, 99, 1), (8, 163, 1)]
    check(Batch(sequences, dtype=DTYPES[dtype], layout=layout))


def test_prefill_stores_the_last_window_only():
    check(Batch([(8, 0, 30), (8, 17, 3), (8, 5, 8), (8, 40, 1)]))


def test_queries_that_no_eviction_asks_for_are_not_stored():
    sequences = [(100, 50, 1), (100, 91, 1), (100, 92, 1), (100, 80, 15), (100, 90, 20)]
    batch = Batch(sequences)
    check(batch)
    stored = (~batch.cache.isnan()).flatten(1).any(1)
    rows = torch.arange(len(sequences))
    first_state_blocks = batch.block_table[rows, torch.tensor(batch.front)].long()
    assert stored[first_state_blocks].tolist() == [
        False,
        False,
        *[True] * 3,
    ]


def test_order_of_programs_does_not_matter():
    """No two tokens write one entry: with the newest token first, the ring is the same."""
    batch = Batch([(8, 0, 30)])
    expected = batch.expected()
    batch.positions, batch.query = batch.positions.flip(0), batch.query.flip(0)
    batch.store()
    torch.testing.assert_close(batch.cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("head_size", [64, 96, 128, 192, 256], ids="D={}".format)
def test_head_size(head_size):
    check(Batch([(8, 0, 10)], head_size=head_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128], ids="block={}".format)
@pytest.mark.parametrize("group_size", [1, 3, 4, 5, 8, 16], ids="G={}".format)
def test_group_and_block_size(group_size, block_size):
    check(Batch([(8, 3, 9)], window=16, group_size=group_size, block_size=block_size))


def test_padding_of_a_graph_batch_writes_nothing():
    batch = Batch([(8, 50, 1), (0, 7, 1), (0, 0, 0), (0, 0, 0)], num_padding=4)
    expected = batch.expected()
    batch.store()
    torch.testing.assert_close(batch.cache, expected, rtol=0, atol=0, equal_nan=True)
    assert batch.cache[0].isnan().all(), "block 0 was written"


def test_queries_beyond_the_tokens_are_left_out():
    """A padded batch has more queries than the step has tokens."""
    batch = Batch([(8, 50, 1), (8, 99, 1)])
    expected = batch.expected()
    batch.query = torch.cat([batch.query, torch.full_like(batch.query, torch.inf)])
    batch.store()
    torch.testing.assert_close(batch.cache, expected, rtol=0, atol=0, equal_nan=True)


def test_more_sequences_than_a_tile_of_rows():
    # Few of them have a token in this step: the interpreter runs one program for each.
    has_token = [row % 64 == 0 or row > 1020 for row in range(1030)]
    sequences = [(8, 50 + row % 9, int(has)) for row, has in enumerate(has_token)]
    check(Batch(sequences, window=2, num_kv_heads=1))


def test_ring_slot_offset_beyond_int32_in_a_large_pool():
    batch = Batch([(8, 20, 1)], dtype=torch.bfloat16)
    expected = batch.expected()
    offset = 2**31 // batch.cache[0].numel() + 1
    large = torch.empty(offset + len(batch.cache), *batch.cache.shape[1:], dtype=torch.bfloat16)
    assert large.numel() > 2**31
    large[offset:] = batch.cache
    batch.cache, small = large, batch.cache
    batch.block_table[:, batch.front[0] :] += offset
    batch.store()
    torch.testing.assert_close(large[offset:], expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(large[offset:].nan_to_num(), small.nan_to_num())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(1, 4, 32), "query must be"),
        ("query", torch.zeros(1, 3, 64), "query must be"),
        ("query", torch.zeros(1, 4, 64, dtype=torch.float16), "query must be"),
        ("positions", torch.zeros(2, dtype=torch.int64), "positions must have shape"),
        ("positions", torch.zeros(1), "positions must be"),
        ("query_start_loc", torch.zeros(1, dtype=torch.int32), "query_start_loc must have"),
        ("seq_lens", torch.zeros(1, dtype=torch.int64), "seq_lens must be torch.int32"),
        ("block_table", torch.zeros(1, 4), "block_table must be"),
        ("cache", torch.zeros(3, 2, 24, 128), "block size must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refuses_by_name(name, value, message):
    batch = Batch([(8, 50, 1)])
    setattr(batch, name, value)
    with pytest.raises(ValueError, match=message):
        batch.store()
