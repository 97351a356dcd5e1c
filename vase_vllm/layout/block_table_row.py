"""What stands where in a block-table row."""

from typing import NamedTuple

from vase_vllm.layout.schedule import Array

NEVER = 2**30
"""``first`` of a sequence that never evicts: a position that no sequence reaches."""


class RowHeader(NamedTuple):
    """The numbers that a row begins with: all that anybody must know of a sequence's evictions.

    Attributes:
        first: position of the sequence's first eviction; 0, as in a padding row, means that the
            row never evicts and none of its tokens is real.
        key: hash of the request's content, which keys the random draws.
        budget: tokens that the sequence holds right after an eviction, its kept prompt included.
        kept: tokens of the prompt that are never evicted: the first ones, in the first slots.
    """

    first: int
    key: int
    budget: int
    kept: int


class BlockTableRow:
    """Columns of a block-table row: the header, then the token blocks, then the state blocks."""

    FIRST = RowHeader._fields.index("first")
    KEY = RowHeader._fields.index("key")
    BUDGET = RowHeader._fields.index("budget")
    KEPT = RowHeader._fields.index("kept")
    NUM_HEADER = len(RowHeader._fields)

    @classmethod
    def state_column(cls, first: Array, block_size: int) -> Array:
        """Column of the first state block, behind the token blocks of the first eviction.

        Args:
            first: position of that eviction.
        """
        return cls.NUM_HEADER - (-first // block_size)
