"""The query ring: stores the queries of the newest tokens of each sequence of a batch.

The query of position p goes to ring entry ``p % window`` of its sequence (see ``paged.py``). Only
the last ``window`` tokens of a sequence enter, so that no two tokens of a batch write the same
entry, and none before the last ``window`` ahead of its first eviction: no eviction reads those.

This is a launch of its own per layer beside the backend's cache write, which stays unchanged. It
reads and writes Hq * D elements per token: for Qwen3-8B in bf16 8 KiB in each direction, 2 MiB in
all at batch 128, which is 0.44 us of an H200's bandwidth. So what it costs is a node of the CUDA
graph: on an H200 the launches of 36 layers took 77 us at batch 16, 81 at 64 and 100 at 256, 2.1 to
2.8 us each (2026-11-26, Triton 3.6). Fusing the two writes has not been measured.

The launch is safe inside a CUDA graph: there is one program per token of the padded batch, and each
decides on the device whether it stores anything. A token beyond ``query_start_loc[R]`` and a token
of a row with ``first`` of 0 store nothing.
"""

from dataclasses import KW_ONLY, dataclass

import torch
import triton
import triton.language as tl

from vase_vllm.kernels.checks import check_block_table, check_cache, check_ring, check_tensor
from vase_vllm.kernels.launch import Launch, run_launches
from vase_vllm.kernels.paged import Pages, ring_pointers


@triton.jit(do_not_specialize=["num_rows"])
def store_ring(
    query,  # [tokens, Hq, D]
    kv_cache,  # [blocks, H, block_size, 2 * D]
    positions,  # [tokens] int32 or int64
    query_start_loc,  # [R + 1] int32
    seq_lens,  # [R] int32
    block_table,  # [R, columns] int32
    num_rows,
    query_token_stride,
    query_head_stride,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_QUERY_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS_TILE: tl.constexpr,
):
    """All query heads of one token."""
    token = tl.program_id(0)
    # The token's row is the number of sequences that end at or before it.
    row = 0
    for start in range(0, num_rows, ROWS_TILE):
        index = start + tl.arange(0, ROWS_TILE)
        ends = tl.load(query_start_loc + 1 + index, mask=index < num_rows, other=2147483647)
        row += tl.sum((ends <= token).to(tl.int32), axis=0)
    if row < num_rows:
        table_row = block_table + row.to(tl.int64) * table_stride
        position = tl.load(positions + token).to(tl.int32)
        first = tl.load(table_row)
        earliest = tl.maximum(tl.load(seq_lens + row), first) - WINDOW
        if (first > 0) & (position >= earliest):
            heads = tl.arange(0, triton.next_power_of_2(NUM_QUERY_HEADS))
            dims = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
            live = heads < NUM_QUERY_HEADS
            mask = live[:, None] & (dims < HEAD_SIZE)[None, :]
            source = query + token.to(tl.int64) * query_token_stride + heads * query_head_stride
            vectors = tl.load(source[:, None] + dims[None, :], mask=mask)
            base = kv_cache + (heads // GROUP).to(tl.int64) * head_stride
            pages = Pages(base, table_row, block_stride, slot_stride, BLOCK_SIZE)
            entries = position % WINDOW + tl.zeros_like(heads)
            target = ring_pointers(pages, entries, heads % GROUP, live, GROUP, HEAD_SIZE)
            tl.store(target[:, None] + dims[None, :], vectors, mask=mask)


@dataclass(frozen=True, eq=False)
class TritonRingWrite:
    """Where the queries of a batch of tokens go in the rings of their sequences, in every layer.

    The queries of positions 6 and 7, with window 2: they are entries 0 and 1 of the ring, and share
    the first cell of state block 2:

    >>> first, key, budget, kept, token_block, state_block = 8, 0, 6, 0, 1, 2
    >>> row = [first, key, budget, kept, token_block, state_block]
    >>> write = TritonRingWrite(
    ...     positions=torch.tensor([6, 7]),
    ...     query_start_loc=torch.tensor([0, 2], dtype=torch.int32),
    ...     seq_lens=torch.tensor([8], dtype=torch.int32),
    ...     block_table=torch.tensor([row], dtype=torch.int32),
    ...     window=2,
    ... )
    >>> cache = torch.zeros(3, 1, 16, 128)  # 3 blocks, 1 KV head, 16 cells of 2 * 64 elements
    >>> query = torch.stack([torch.full((1, 64), 6.0), torch.full((1, 64), 7.0)])
    >>> write.store(cache, query)
    >>> cache[2, 0, 0, ::64]
    tensor([6., 7.])

    Attributes:
        positions: [tokens] int32 or int64, true positions.
        query_start_loc: [R + 1] int32, first token of each sequence, non-decreasing.
        seq_lens: [R] int32, tokens of each sequence after this step: true lengths, not cached ones.
        block_table: [R, columns] int32, rows of a header, token blocks and state blocks.
        window: entries of the ring.
    """

    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    _: KW_ONLY
    window: int

    def store(self, kv_cache: torch.Tensor, query: torch.Tensor) -> None:
        """Write one layer's queries: one launch, safe inside a CUDA graph.

        Args:
            kv_cache: [num_blocks, H, block_size, 2 * D] of the layer, changed in its state blocks.
            query: [tokens or more, Hq, D], post-RoPE, in the cache's dtype; the last dimension
                contiguous. What lies beyond ``tokens`` is padding.

        Raises:
            ValueError: names the argument whose shape, dtype, device or stride is not supported.
        """
        query = query[: len(self.positions)]
        self.check(kv_cache, query)
        if len(query):
            run_launches([self.launch(kv_cache, query)], kv_cache.device)

    def check(self, kv_cache: torch.Tensor, query: torch.Tensor) -> None:
        """Check all arguments of :meth:`store`.

        Raises:
            ValueError: see :meth:`store`.
        """
        check_cache(kv_cache)
        check_block_table(self.block_table, kv_cache.device)
        _, num_kv_heads, block_size, pair_size = kv_cache.shape
        num_rows, device = len(self.block_table), kv_cache.device
        if query.dim() != 3 or query.shape[2] != pair_size // 2 or query.shape[1] % num_kv_heads:
            raise ValueError(
                f"query must be [tokens, multiple of {num_kv_heads} heads, {pair_size // 2}], "
                f"got {tuple(query.shape)}"
            )
        if query.dtype != kv_cache.dtype or query.device != device or query.stride(2) != 1:
            raise ValueError(
                f"query must be {kv_cache.dtype} on {device} with a contiguous last dimension, "
                f"got {query.dtype} on {query.device}"
            )
        group_size = query.shape[1] // num_kv_heads
        check_ring(self.window, group_size, block_size)
        integers = (torch.int32, torch.int64)
        check_tensor("positions", self.positions, (len(query),), integers, device)
        starts = self.query_start_loc
        check_tensor("query_start_loc", starts, (num_rows + 1,), (torch.int32,), device)
        check_tensor("seq_lens", self.seq_lens, (num_rows,), (torch.int32,), device)

    def launch(self, kv_cache: torch.Tensor, query: torch.Tensor) -> Launch:
        """The launch: one program per token."""
        num_tokens, num_query_heads, head_size = query.shape
        arguments = dict(
            query=query,
            kv_cache=kv_cache,
            positions=self.positions,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            block_table=self.block_table,
            num_rows=len(self.block_table),
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            table_stride=self.block_table.stride(0),
            block_stride=kv_cache.stride(0),
            head_stride=kv_cache.stride(1),
            slot_stride=kv_cache.stride(2),
            WINDOW=self.window,
            GROUP=num_query_heads // kv_cache.shape[1],
            NUM_QUERY_HEADS=num_query_heads,
            HEAD_SIZE=head_size,
            BLOCK_SIZE=kv_cache.shape[2],
            ROWS_TILE=1024,
            num_warps=4,
        )
        return Launch(store_ring, num_tokens, arguments)
