"""Reads and writes the query ring in the pages of a layer, in plain torch."""

from dataclasses import dataclass

import numpy as np
import torch

from vase_vllm.layout.block_table_row import BlockTableRow
from vase_vllm.layout.query_ring import RingLayout


def ring_view(ring: RingLayout, kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache seen as ring entries.

    Args:
        kv_cache: [num_blocks, H, block_size, 2 * D], the last two dimensions contiguous.

    Returns:
        [num_blocks, H, entries_per_block, G * D], a view.
    """
    head_size = kv_cache.shape[-1] // 2
    entry = ring.group_size * head_size
    page = kv_cache.flatten(2)
    return page[..., : ring.entries_per_block * entry].unflatten(
        -1, (ring.entries_per_block, entry)
    )


def load_queries(
    ring: RingLayout, kv_cache: torch.Tensor, state_blocks: torch.Tensor
) -> torch.Tensor:
    """All queries of one sequence.

    Args:
        kv_cache: [num_blocks, H, block_size, 2 * D].
        state_blocks: [ring.num_blocks] int64, of the sequence.

    Returns:
        [H, window * G, D], window-major, in the cache's dtype.
    """
    num_kv_heads, head_size = kv_cache.shape[1], kv_cache.shape[-1] // 2
    # Gathered first: a GPU's pages need not have a head's cells side by side.
    pages = kv_cache.index_select(0, state_blocks)
    entries = ring_view(ring, pages).transpose(0, 1).flatten(1, 2)
    return entries[:, : ring.window].reshape(num_kv_heads, -1, head_size)


@dataclass(frozen=True)
class TorchRingWrite:
    """The queries of one step that enter the ring: those that an eviction will ask for.

    Attributes:
        layout: of the layers that share this step's metadata.
        tokens: [n] int64 indices into the step's tokens, or None if every token enters.
        blocks: [n] int64 state block of each.
        entries: [n] int64 ring entry within the block.
    """

    layout: RingLayout
    tokens: torch.Tensor | None
    blocks: torch.Tensor
    entries: torch.Tensor

    @classmethod
    def plan(
        cls,
        layout: RingLayout,
        block_table: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        seq_lens: np.ndarray,
    ) -> "TorchRingWrite | None":
        """Find where this step's queries go.

        Of each sequence at most the last ``window`` do, and none before the last ``window`` in
        front of its first eviction: a sequence that stays below its budget stores nothing. None
        means that no query does.

        Args:
            block_table: [R, columns] int32, whole rows.
            rows: [T] int64 row of each token.
            positions: [T] int64 position of each token.
            seq_lens: [R] tokens of each sequence after this step.
        """
        first = block_table[rows, BlockTableRow.FIRST]
        state = BlockTableRow.state_column(first, layout.block_size)
        earliest = np.maximum(seq_lens[rows], first) - layout.window
        enters = (first > 0) & (positions >= earliest)
        entering = np.flatnonzero(enters)
        if not len(entering):
            return None
        tokens = None
        if len(entering) < len(positions):
            tokens = torch.from_numpy(entering)
            rows, positions, state = rows[entering], positions[entering], state[entering]
        column, entry = np.divmod(positions % layout.window, layout.entries_per_block)
        blocks = block_table[rows, state + column]
        return cls(
            layout,
            tokens,
            torch.from_numpy(blocks.astype(np.int64)),
            torch.from_numpy(entry),
        )

    def store(self, kv_cache: torch.Tensor, query: torch.Tensor) -> None:
        """Write queries into the state blocks of one layer.

        Args:
            kv_cache: [num_blocks, H, block_size, 2 * D].
            query: [T or more, H * G, D], post-RoPE.
        """
        num_tokens = self.blocks.shape[0]
        query = query[:num_tokens] if self.tokens is None else query[self.tokens]
        num_kv_heads = kv_cache.shape[1]
        ring_view(self.layout, kv_cache)[self.blocks, :, self.entries] = query.reshape(
            num_tokens, num_kv_heads, -1
        )
