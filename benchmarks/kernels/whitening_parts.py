"""The parts of ``window_whitening`` in its machine code, and how often an eviction runs each."""

from typing import Any

from benchmarks.kernels.machine_code import MachineCode
from benchmarks.kernels.prediction import Part
from benchmarks.kernels.selection_parts import part
from vase_vllm.layout.arithmetic import cdiv


def whitening_parts(code: MachineCode, arguments: dict[str, Any]) -> list[Part]:
    """The parts of a program, which makes the basis of one head.

    Args:
        code: of the kernel.
        arguments: of the launch.

    Raises:
        ValueError: the machine code has other loops than these.
    """
    loops = code.loops()
    if len(loops) != 4:
        raise ValueError(f"{len(loops)} loops, not 4")
    lengths, rows_before, own_rows, around = loops
    window, size = arguments["WINDOW"], arguments["PART"]
    num_parts = cdiv(window, size)
    inner = len(rows_before.instructions) + len(own_rows.instructions)
    once = len(code.instructions) - len(lengths.instructions) - len(around.instructions)
    return [
        # The task: its row, the row's header, the layer's address.
        Part("once", 1, once, loads=4, barriers=1),
        # The block of a value, and the value.
        part("lengths", num_parts, lengths, loads=2),
        Part("values", num_parts, len(around.instructions) - inner, loads=2, barriers=1),
        # A row is asked for two rounds ahead.
        part("rows before", sum(range(0, window, size)), rows_before, loads=0),
        part("own rows", window, own_rows, loads=0),
    ]
