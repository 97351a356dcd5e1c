"""The remapping launch against the closed form: every slot, start and cached length of a batch."""

import pytest
import torch

from vase_vllm.kernels.remap import TOKEN_TILE, BatchRemap
from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.schedule import EvictionSchedule

PAD_SLOT = -1
UNTOUCHED = -7


class Batch:
    """A step of sequences given as (first eviction, tokens before the step, tokens in it).

    A ``first`` of 0 is a padding row or, with tokens, a dummy one: its header is 0.
    """

    def __init__(
        self,
        sequences,
        budget=40,
        window=8,
        block_size=16,
        num_padding=0,
        largest_block=1000,
        spare_columns=0,
        own_budgets=False,
    ):
        self.schedule = EvictionSchedule(budget, window)
        self.block_size, self.front = block_size, BlockTableRow.NUM_HEADER
        self.first = torch.tensor([first for first, _, _ in sequences])
        before = torch.tensor([before for _, before, _ in sequences])
        self.counts = torch.tensor([count for _, _, count in sequences])
        longest = max(self.schedule.bound, int(self.first.max()))
        num_columns = self.front - (-longest // block_size)
        num_rows = len(sequences)
        generator = torch.Generator().manual_seed(0)
        sizes = (num_rows, num_columns + spare_columns)
        table = largest_block - torch.randint(1000, sizes, generator=generator)
        self.budget = torch.full_like(self.first, budget)
        if own_budgets:
            self.budget[1::2] -= window + 1
        table[:, BlockTableRow.FIRST] = self.first
        table[:, BlockTableRow.BUDGET] = self.budget
        table[self.first == 0] = 0
        self.block_table = table.int()[:, :num_columns]
        self.query_start_loc = torch.cat([torch.zeros(1), self.counts.cumsum(0)]).int()
        self.seq_lens = (before + self.counts).int()
        num_tokens = int(self.counts.sum())
        self.slot_mapping = torch.full((num_tokens + num_padding,), PAD_SLOT)
        self.starts = torch.full((num_rows,), UNTOUCHED, dtype=torch.int32)
        self.num_cached = torch.full((num_rows,), UNTOUCHED, dtype=torch.int32)
        shape = (num_rows, num_columns - self.front + spare_columns)
        self.token_table = torch.full(shape, UNTOUCHED, dtype=torch.int32)

    def remap(self):
        BatchRemap(
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.slot_mapping,
            self.starts,
            self.num_cached,
            self.token_table,
            window=self.schedule.window,
            block_size=self.block_size,
        ).run()

    def expected(self):
        """(slot mapping, starts, cached lengths) by the schedule, in int64."""
        starts = self.seq_lens.long() - self.counts
        mapping = self.slot_mapping.clone()
        for row in range(len(self.first)):
            if self.first[row] == 0:
                continue
            positions = starts[row] + torch.arange(self.counts[row])
            slots = self.schedule.slots(positions, self.first[row], self.budget[row])
            blocks = self.block_table[row, self.front + slots // self.block_size].long()
            begin = int(self.query_start_loc[row])
            mapping[begin : begin + len(slots)] = blocks * self.block_size + slots % self.block_size
        cached = self.schedule.slots(self.seq_lens.long() - 1, self.first, self.budget) + 1
        return mapping, starts, cached


def check(batch):
    mapping, starts, cached = batch.expected()
    batch.remap()
    assert batch.slot_mapping.tolist() == mapping.tolist()
    assert batch.starts.tolist() == starts.tolist()
    assert batch.num_cached.tolist() == cached.tolist()
    for row, num_cached in enumerate(cached.tolist()):
        # A dummy row may be longer than its blocks.
        num_columns = batch.block_table.shape[1] - batch.front
        num_blocks = min(-(-num_cached // batch.block_size), num_columns)
        blocks = batch.block_table[row, batch.front : batch.front + num_blocks].tolist()
        spare = [UNTOUCHED] * (batch.token_table.shape[1] - num_blocks)
        assert batch.token_table[row].tolist() == blocks + spare
    return batch


def test_steady_rows_cycle_through_the_window():
    batch = check(Batch([(48, 48 + step, 1) for step in range(20)]))
    assert batch.num_cached.tolist() == [41 + step % 8 for step in range(20)]


def test_rows_before_their_first_eviction():
    batch = check(Batch([(48, 0, 1), (48, 15, 1), (48, 16, 1), (48, 47, 1), (96, 60, 1)]))
    assert batch.num_cached.tolist() == [1, 16, 17, 48, 61]


@pytest.mark.parametrize("count", [1, 30, TOKEN_TILE, TOKEN_TILE + 1, 300], ids="chunk={}".format)
def test_prefill_chunks(count):
    check(Batch([(400, 0, count), (400, 77, count), (48, 47, 1)]))


def test_replayed_chunks_after_an_eviction():
    """A preempted sequence recomputes its output, up to a window of tokens in a step."""
    batch = check(Batch([(48, 40, 8), (48, 48, 8), (48, 59, 5), (96, 104, 3), (96, 90, 6)]))
    assert batch.num_cached.tolist() == [48, 48, 48, 43, 96]


def test_padding_rows_write_nothing():
    batch = check(Batch([(48, 50, 1), (0, 0, 0), (48, 10, 3), (0, 0, 0), (0, 0, 0)]))
    assert batch.num_cached.tolist()[-2:] == [0, 0]
    assert (batch.slot_mapping != PAD_SLOT).all()


def test_dummy_rows_with_tokens_write_nothing():
    batch = check(Batch([(0, 0, 1), (0, 0, 4), (48, 50, 1), (0, 90, 1)]))
    assert (batch.slot_mapping == PAD_SLOT).tolist() == [*[True] * 5, False, True]
    # Attention over a dummy row is as long as vLLM says.
    assert batch.num_cached.tolist() == [1, 4, 43, 91]


def test_padded_tokens_keep_their_slot():
    batch = check(Batch([(48, 50, 1), (48, 3, 7), (0, 0, 0)], num_padding=5))
    assert batch.slot_mapping[-5:].tolist() == [PAD_SLOT] * 5


@pytest.mark.parametrize("block_size", [16, 32, 64, 128], ids="block={}".format)
@pytest.mark.parametrize(("budget", "window"), [(9, 8), (63, 1), (500, 13)], ids=str)
def test_odd_counts_of_slots_and_blocks(budget, window, block_size):
    bound = budget + window
    sequences = [(bound, bound + step, 1) for step in range(window + 1)]
    sequences += [(bound + 3 * window, 0, bound), (bound, bound + window, window)]
    check(Batch(sequences, budget, window, block_size))


def test_a_block_table_that_is_part_of_a_wider_one():
    check(Batch([(48, 50, 1), (48, 20, 9), (48, 64, 2)], spare_columns=5))


def test_the_same_step_twice():
    """Several builders rewrite one slot mapping: it depends on nothing that they change."""
    batch = check(Batch([(48, 50, 1), (96, 20, 30)]))
    check(batch)


@pytest.mark.parametrize("seed", range(4), ids="seed={}".format)
def test_random_batches(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    schedule, sequences = EvictionSchedule(40, 8), []
    for _ in range(25):
        first = schedule.first_eviction(draw(1, 200))
        before = draw(0, 3 * first)
        sequences.append(
            (first, before, draw(1, 1 + schedule.tokens_until_eviction(before, first)))
        )
    check(Batch(sequences, num_padding=3, own_budgets=seed % 2))


def test_int32_overflow_of_a_slot_in_a_large_pool():
    sequences = [(48, 50, 1), (48, 0, 20), (48, 64, 3)]
    batch = check(Batch(sequences, block_size=128, largest_block=2**31 - 1))
    assert (batch.slot_mapping > 2**37).all()


def test_no_rows():
    empty = torch.zeros(0, dtype=torch.int32)
    table, mapping = torch.zeros(0, 7, dtype=torch.int32), torch.full((3,), PAD_SLOT)
    sizes = dict(window=8, block_size=16)
    blocks = torch.zeros(0, 3, dtype=torch.int32)
    BatchRemap(torch.zeros(1).int(), empty, table, mapping, empty, empty, blocks, **sizes).run()
    assert mapping.tolist() == [PAD_SLOT] * 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query_start_loc", torch.zeros(1).int(), "query_start_loc must have shape"),
        ("seq_lens", torch.zeros(1).long(), "seq_lens must be torch.int32"),
        ("block_table", torch.zeros(1, 8), "block_table must be"),
        ("slot_mapping", torch.zeros(1).int(), "slot_mapping must be torch.int64"),
        ("starts", torch.zeros(2).int(), "starts must have shape"),
        ("num_cached", torch.zeros(1), "num_cached must be torch.int32"),
        ("token_table", torch.zeros(1, 1).int(), "token_table must have 3 columns or more, got 1"),
        ("token_table", torch.zeros(1, 8).int()[:, ::2], "token_table must be contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refuses_by_name(name, value, message):
    batch = Batch([(48, 50, 1)])
    setattr(batch, name, value)
    with pytest.raises(ValueError, match=message):
        batch.remap()
