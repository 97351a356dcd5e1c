"""Remapping: where a step's new tokens are written, and what attention is shown of each sequence.

A position lies in the slot of its own number until the sequence's first eviction, and then in slot
``T + (p - first) mod W``. One small launch, one program per sequence, rewrites the batch's buffers:
it reads nothing but those persistent buffers and needs no number from the host.

Attention gets a block table of its own, without the header in front of the token blocks: some of
FlashInfer's kernels (XQA, trtllm-gen) take the pitch of the rows from the table's last dimension,
so a view of vLLM's table would not do.
"""

from dataclasses import KW_ONLY, dataclass

import torch
import triton
import triton.language as tl

from vase_vllm.kernels.checks import check_block_table, check_tensor
from vase_vllm.kernels.launch import Launch, run_launches
from vase_vllm.kernels.paged import TOKEN_COLUMN
from vase_vllm.layout.block_table_row import BlockTableRow

TOKEN_TILE = 128


@triton.jit
def remap_sequences(
    query_start_loc,  # [R + 1] int32
    seq_lens,  # [R] int32
    block_table,  # [R, columns] int32
    slot_mapping,  # [tokens] int64, changed
    starts,  # [R] int32, written
    num_cached,  # [R] int32, written
    token_table,  # [R, token columns] int32, written as far as tokens are cached
    num_columns,  # of the token blocks in a row of block_table
    table_stride,
    token_table_stride,
    BUDGET_COLUMN: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One sequence: its new tokens' slots, its first new position, cached length and blocks."""
    row = tl.program_id(0)
    table_row = block_table + row.to(tl.int64) * table_stride
    first = tl.load(table_row)
    budget = tl.load(table_row + BUDGET_COLUMN)
    seq_len = tl.load(seq_lens + row)
    query_start = tl.load(query_start_loc + row)
    query_len = tl.load(query_start_loc + row + 1) - query_start
    start = seq_len - query_len
    tl.store(starts + row, start)
    # A padding row has a length and a header of 0.
    last = seq_len - 1
    evicted = (first > 0) & (last >= first)
    cached = tl.where(evicted, budget + (last - first) % WINDOW + 1, seq_len)
    tl.store(num_cached + row, cached)
    token_row = token_table + row.to(tl.int64) * token_table_stride
    # A dummy row may be said to be longer than its blocks.
    num_blocks = tl.minimum((cached + BLOCK_SIZE - 1) // BLOCK_SIZE, num_columns)
    for offset in range(0, num_blocks, TILE):
        column = offset + tl.arange(0, TILE)
        live = column < num_blocks
        blocks = tl.load(table_row + TOKEN_COLUMN + column, mask=live)
        tl.store(token_row + column, blocks, mask=live)
    if first > 0:
        for offset in range(0, query_len, TILE):
            token = offset + tl.arange(0, TILE)
            live = token < query_len
            position = start + token
            slot = tl.where(position >= first, budget + (position - first) % WINDOW, position)
            column = TOKEN_COLUMN + slot // BLOCK_SIZE
            block = tl.load(table_row + column, mask=live, other=0).to(tl.int64)
            target = slot_mapping + query_start + token
            tl.store(target, block * BLOCK_SIZE + slot % BLOCK_SIZE, mask=live)


@dataclass(frozen=True, eq=False)
class BatchRemap:
    """The slots and lengths of a batch, computed in place.

    A sequence that first evicted at position 12 computes position 13. With budget 8 and window 4
    that token goes to slot ``8 + (13 - 12) % 4 = 9``, here of block 3:

    >>> first, key, budget, kept, token_block, state_block = 12, 0, 8, 0, 3, 7
    >>> row = [first, key, budget, kept, token_block, state_block]
    >>> block_table = torch.tensor([row], dtype=torch.int32)
    >>> slot_mapping = torch.tensor([3 * 16 + 13])  # as vLLM computed it
    >>> starts, num_cached = torch.zeros(2, 1, dtype=torch.int32)
    >>> token_table = torch.zeros(1, 2, dtype=torch.int32)
    >>> BatchRemap(
    ...     query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
    ...     seq_lens=torch.tensor([14], dtype=torch.int32),
    ...     block_table=block_table,
    ...     slot_mapping=slot_mapping,
    ...     starts=starts,
    ...     num_cached=num_cached,
    ...     token_table=token_table,
    ...     window=4,
    ...     block_size=16,
    ... ).run()
    >>> divmod(slot_mapping.item(), 16)
    (3, 9)
    >>> starts.item(), num_cached.item(), token_table.tolist()
    (13, 10, [[3, 0]])

    Attributes:
        query_start_loc: [R + 1] int32, first token of each sequence.
        seq_lens: [R] int32, tokens of each sequence after the step; 0 in padding rows.
        block_table: [R, columns] int32, rows of a header, token blocks and state blocks.
        slot_mapping: [tokens] int64; entries of padding tokens and of rows with ``first`` of 0 stay
            as they are.
        starts: [R] int32, receives the position that each sequence's step starts at.
        num_cached: [R] int32, receives the tokens that each sequence has cached after the step.
        token_table: [R, token columns or more] int32, contiguous, receives the token blocks of each
            row as far as tokens are cached; the rest stays as it is.
        window: tokens between evictions.
        block_size: token slots of a block.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    starts: torch.Tensor
    num_cached: torch.Tensor
    token_table: torch.Tensor
    _: KW_ONLY
    window: int
    block_size: int

    def run(self) -> None:
        """Launch the remapping, without waiting for it.

        Raises:
            ValueError: see :meth:`check`.
        """
        self.check()
        if len(self.block_table):
            run_launches([self.launch()], self.block_table.device)

    def check(self) -> None:
        """Check all tensors.

        Raises:
            ValueError: names the argument whose shape, dtype or device is not supported.
        """
        num_rows, device = self.block_table.shape[0], self.block_table.device
        check_block_table(self.block_table, device)
        int32, int64 = (torch.int32,), (torch.int64,)
        check_tensor("query_start_loc", self.query_start_loc, (num_rows + 1,), int32, device)
        check_tensor("seq_lens", self.seq_lens, (num_rows,), int32, device)
        num_tokens = self.slot_mapping.shape[:1]
        check_tensor("slot_mapping", self.slot_mapping, num_tokens, int64, device)
        check_tensor("starts", self.starts, (num_rows,), int32, device)
        check_tensor("num_cached", self.num_cached, (num_rows,), int32, device)
        width = self.token_table.shape[-1]
        check_tensor("token_table", self.token_table, (num_rows, width), int32, device)
        if width < self._num_token_columns:
            raise ValueError(
                f"token_table must have {self._num_token_columns} columns or more, got {width}"
            )

    @property
    def _num_token_columns(self) -> int:
        return self.block_table.shape[1] - BlockTableRow.NUM_HEADER

    def launch(self) -> Launch:
        """The launch: one program per sequence."""
        arguments = dict(
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            block_table=self.block_table,
            slot_mapping=self.slot_mapping,
            starts=self.starts,
            num_cached=self.num_cached,
            token_table=self.token_table,
            num_columns=self._num_token_columns,
            table_stride=self.block_table.stride(0),
            token_table_stride=self.token_table.stride(0),
            BUDGET_COLUMN=BlockTableRow.BUDGET,
            WINDOW=self.window,
            BLOCK_SIZE=self.block_size,
            TILE=TOKEN_TILE,
            num_warps=4,
        )
        return Launch(remap_sequences, len(self.block_table), arguments)
