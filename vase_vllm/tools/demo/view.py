"""What the demo shows: two outputs side by side, and a table of what the servers held."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.demo.race import TOPICS, Side

MOST_ROWS = 10


class Excerpt:
    """The beginning and the end of a text, wrapped; of a short text all.

    Args:
        text: what is shown.
        head: lines of its beginning.
        tail: lines of its end.
    """

    def __init__(self, text: str, head: int, tail: int) -> None:
        self.text, self.head, self.tail = text, head, tail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = list(Text(self.text).wrap(console, options.max_width))
        num_left_out = len(lines) - self.head - self.tail
        if num_left_out > 0:
            left_out = Text(f"... ({num_left_out} lines are left out here) ...", style="dim italic")
            lines[self.head : len(lines) - self.tail] = [left_out]
        yield from lines


def side_by_side(sides: Sequence[Side], head: int, tail: int) -> Table:
    """The output of the first request of each server; ``head`` and ``tail`` as in Excerpt."""
    grid = Table.grid(expand=True)
    cells = []
    for side in sides:
        grid.add_column(ratio=1)
        first = side.outputs[0]
        title, subtitle = f"[bold]{side.name}[/]", f"{first.num_generated} tokens generated"
        cells.append(Panel(Excerpt(first.text, head, tail), title=title, subtitle=subtitle))
    grid.add_row(*cells)
    return grid


def progress(sides: Sequence[Side], height: int) -> Table:
    """What fits into a terminal of ``height`` lines while the outputs are generated."""
    grid = side_by_side(sides, head=0, tail=max(height - 8, 4))
    notes = []
    for side in sides:
        note = f"all {len(TOPICS)} requests: {side.num_generated} tokens"
        if side.samples:
            last = side.samples[-1]
            note += f"\n{last.num_running} running, {last.num_blocks} KV blocks in use"
        notes.append(Text(note, style="cyan", justify="center"))
    grid.add_row(*notes)
    return grid


def held_over_time(sides: Sequence[Side]) -> Table:
    """What both servers had generated and held at up to ``MOST_ROWS`` of the sampled moments."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\n\ns", justify="right")
    for side in sides:
        name = f"{side.name}:".split()
        lines = [""] * (2 - len(name)) + name
        table.add_column("\n".join([*lines, "tokens"]), justify="right")
        for heading in ("\n\nruns", "\nKV\nblocks", "\ntokens\nheld"):
            table.add_column(heading, justify="right")
    table.add_column("\nevic-\ntions", justify="right")
    rows = list(zip(*(side.samples for side in sides), strict=False))
    for samples in rows[:: cdiv(len(rows), MOST_ROWS) or 1]:
        cells = [f"{samples[0].seconds:.0f}"]
        for each in samples:
            numbers = (each.num_generated, each.num_running, each.num_blocks, each.tokens_held)
            cells += map(str, numbers)
        table.add_row(*cells, str(samples[-1].num_evictions))
    return table
