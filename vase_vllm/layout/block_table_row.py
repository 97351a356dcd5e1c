"""What stands where in a block-table row."""


class BlockTableRow:
    """Columns of a block-table row.

    ``FIRST`` holds the position of the sequence's first eviction, from which its whole schedule
    follows; 0, as in a padding row, means that the row never evicts. ``KEY`` holds a hash of the
    request's content that keys the random draws.
    """

    FIRST = 0
    KEY = 1
    NUM_HEADER = 2
