"""The query ring: the last ``window`` queries of a sequence, in blocks of its own.

The query of position p, all query heads of a layer, is stored at ring entry ``p mod window``. A
state block of a KV head is one page of ``block_size`` cells of 2 * head_size elements; the queries
of the head's G query heads lie in it one after another, ``tokens_per_block`` entries to a block.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.math_utils import cdiv

from vase_vllm.block_table_row import BlockTableRow


@dataclass(frozen=True)
class RingLayout:
    """Where ring entries lie in state blocks.

    Attributes:
        window: entries of the ring.
        group_size: query heads per KV head (G).
        block_size: token slots of a block.
    """

    window: int
    group_size: int
    block_size: int

    @property
    def tokens_per_block(self) -> int:
        """Ring entries per state block: a cell holds a key and a value, so two queries."""
        return 2 * self.block_size // self.group_size

    @property
    def num_blocks(self) -> int:
        """State blocks of a sequence."""
        return cdiv(self.window, self.tokens_per_block)

    def view(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache seen as ring entries.

        Args:
            kv_cache: [num_blocks, H, block_size, 2 * D], the last two dimensions contiguous.

        Returns:
            [num_blocks, H, tokens_per_block, G * D], a view.
        """
        head_size = kv_cache.shape[-1] // 2
        entry = self.group_size * head_size
        page = kv_cache.flatten(2)
        return page[..., : self.tokens_per_block * entry].unflatten(
            -1, (self.tokens_per_block, entry)
        )

    def load(self, kv_cache: torch.Tensor, state_blocks: torch.Tensor) -> torch.Tensor:
        """All queries of one sequence: [H, window * G, D], window-major, in the cache's dtype."""
        num_kv_heads, head_size = kv_cache.shape[1], kv_cache.shape[-1] // 2
        # Gathered first: a GPU's pages need not have a head's cells side by side.
        entries = self.view(kv_cache[state_blocks]).transpose(0, 1).flatten(1, 2)
        return entries[:, : self.window].reshape(num_kv_heads, -1, head_size)


@dataclass(frozen=True)
class RingWrite:
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
    ) -> "RingWrite":
        """Find where this step's queries go.

        Of each sequence at most the last ``window`` do, and none before the last ``window`` in
        front of its first eviction: a sequence that stays below its budget stores nothing.

        Args:
            block_table: [R, columns] int32, whole rows.
            rows: [T] int64 row of each token.
            positions: [T] int64 position of each token.
            seq_lens: [R] tokens of each sequence after this step.
        """
        first = block_table[rows, BlockTableRow.FIRST]
        earliest = np.maximum(seq_lens[rows], first) - layout.window
        enters = (first > 0) & (positions >= earliest)
        tokens = None
        if not enters.all():
            tokens = np.flatnonzero(enters)
            rows, positions = rows[tokens], positions[tokens]
        column, entry = np.divmod(positions % layout.window, layout.tokens_per_block)
        blocks = block_table[rows, BlockTableRow.NUM_HEADER + column]
        return cls(
            layout,
            None if tokens is None else torch.from_numpy(tokens),
            torch.from_numpy(blocks.astype(np.int64)),
            torch.from_numpy(entry),
        )

    @classmethod
    def nothing(cls, layout: RingLayout) -> "RingWrite":
        """No query is stored."""
        empty = torch.empty(0, dtype=torch.int64)
        return cls(layout, None, empty, empty)

    def store(self, kv_cache: torch.Tensor, query: torch.Tensor) -> None:
        """Write queries into the state blocks of one layer.

        Args:
            kv_cache: [num_blocks, H, block_size, 2 * D].
            query: [T or more, H * G, D], post-RoPE.
        """
        num_tokens = self.blocks.shape[0]
        if num_tokens == 0:
            return
        query = query[:num_tokens] if self.tokens is None else query[self.tokens]
        num_kv_heads = kv_cache.shape[1]
        self.layout.view(kv_cache)[self.blocks, :, self.entries] = query.reshape(
            num_tokens, num_kv_heads, -1
        )
