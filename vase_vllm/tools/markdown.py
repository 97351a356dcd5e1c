"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> list[str]:
    """The lines of a table.

    Args:
        header: of the columns.
        rows: a cell for each column.
        num_left: the first so many columns are text, aligned left; the others are numbers.
    """
    alignment = ["---"] * num_left + ["---:"] * (len(header) - num_left)
    return [f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows)]
