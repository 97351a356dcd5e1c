"""The parts of ``select_and_move`` in its machine code, and how often an eviction runs each."""

import re
from typing import Any

from benchmarks.kernels.machine_code import Loop, MachineCode
from benchmarks.kernels.prediction import Part
from vase_vllm.layout.arithmetic import cdiv

LOAD, STORE, BARRIER = (re.compile(rf"{name}\b") for name in ("LDG", "STG", "BAR"))
PROTECTED_BITS, PRIORITY_BITS = 12, 19
"""Bits that the searches for the protected and for the survivors look at, of at most 32.

Of drawn heads with 4096 candidates: 10 to 17 for the ranges of normal bf16 values, 19 for the
logarithms of a softmax of normal logits with Gumbel noise, and 12 for that softmax without noise.
A bit that is passed over takes six instructions, which are not counted.
"""
NUM_TIE_TILES = 2
"""Tiles in which the ties of the protected are looked for, from the end: half of four."""


def selection_parts(
    code: MachineCode, arguments: dict[str, Any], budget: int, num_heads: int
) -> list[Part]:
    """The parts of a program that selects by attention from a head with ``budget`` candidates.

    All instructions outside of loops are counted, and so are the few among them that only heads
    with more candidates than SEARCH_TILE reach.

    Args:
        code: of the kernel.
        arguments: of the launch; ``budget`` is at most its SEARCH_TILE.
        budget: tokens that are kept, of as many candidates and WINDOW newer ones.
        num_heads: that the launch evicts from.

    Raises:
        ValueError: the machine code has other loops than these.
    """
    loops = code.outer_loops()
    searches = [loop for loop in loops if not loop.count(LOAD) and not loop.count(STORE)]
    stores = [loop for loop in loops if loop.count(STORE)]
    if len(searches) != 2 or len(stores) != 3:
        raise ValueError(
            f"{len(searches)} loops that touch no memory, not 2; {len(stores)} that store, not 3"
        )
    priorities, survivors, moves = stores
    ties = loops[loops.index(priorities) - 1]
    num_tiles = cdiv(budget, arguments["TILE"])
    window = arguments["WINDOW"]
    # W cells of a key and a value of two bytes an element are read and written.
    num_bytes = 2 * num_heads * window * 2 * arguments["HEAD_SIZE"] * 2
    once = len(code.instructions) - sum(len(loop.instructions) for loop in loops)
    return [
        # The task: its row, the row's header, the layer's address; then its ordered bits, twice.
        Part("once", 1, once, loads=5, barriers=8),
        part("protected", PROTECTED_BITS, searches[0], loads=0),
        part("ties", NUM_TIE_TILES, ties, loads=1),
        part("priorities", num_tiles, priorities, loads=1),
        part("threshold", PRIORITY_BITS, searches[1], loads=0),
        part("survivors", cdiv(budget, 2 * arguments["TILE"]), survivors, loads=1),
        # The freed slot, its block, the cell.
        part("moves", cdiv(window, arguments["MOVE_TILE"]), moves, loads=3, num_bytes=num_bytes),
    ]


def part(name: str, rounds: int, loop: Loop, loads: int, num_bytes: int = 0) -> Part:
    """A loop that runs so many rounds."""
    return Part(name, rounds, len(loop.instructions), loads, loop.count(BARRIER), num_bytes)
