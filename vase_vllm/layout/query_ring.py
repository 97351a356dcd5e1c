"""Where the query ring lies: the last ``window`` queries of a sequence, in blocks of its own.

The query of position p, all query heads of a layer, is stored at ring entry ``p mod window``. A
state block of a KV head is one page of ``block_size`` cells of 2 * head_size elements; the queries
of the head's G query heads lie in it one after another, ``entries_per_block`` entries to a block.
"""

from dataclasses import dataclass

from vase_vllm.layout.arithmetic import cdiv


@dataclass(frozen=True)
class RingLayout:
    """Where ring entries lie in state blocks.

    >>> ring = RingLayout(window=64, group_size=4, block_size=16)
    >>> ring.entries_per_block, ring.num_blocks
    (8, 8)

    Attributes:
        window: entries of the ring.
        group_size: query heads per KV head (G).
        block_size: token slots of a block.
    """

    window: int
    group_size: int
    block_size: int

    @property
    def entries_per_block(self) -> int:
        """Ring entries per state block: a cell holds a key and a value, so two queries.

        0 if not even one entry fits.
        """
        return 2 * self.block_size // self.group_size

    @property
    def num_blocks(self) -> int:
        """State blocks of a sequence.

        Raises:
            ValueError: a block is too small for one entry; the message names the remedy.
        """
        if reason := self.misfit():
            raise ValueError(reason)
        return cdiv(self.window, self.entries_per_block)

    def misfit(self) -> str | None:
        """Why no ring fits into blocks of this size, in one line that names the remedy, or None."""
        if self.entries_per_block:
            return None
        return (
            f"--block-size {self.block_size} does not fit {self.group_size} query heads per KV "
            f"head; set --block-size to at least {cdiv(self.group_size, 2)}"
        )
