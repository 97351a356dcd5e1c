"""What ptxas made of a kernel, read from the text of ``cuobjdump``, which comes with Triton."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)(.*?);")
RESOURCE = re.compile(r"(REG|STACK|LOCAL):(\d+)")
TENSOR_CORE = re.compile(r"(HGMMA|HMMA|UTC\w*MMA)\b")
FUSED_MULTIPLY_ADD = re.compile(r"FFMA2?\b")
WIDE_ASYNC_LOAD = re.compile(r"LDGSTS\b.*\.128(\.|$)")
LOCAL_ACCESS = re.compile(r"(LDL|STL)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address in bytes, its name with modifiers, and its operands."""

    address: int
    name: str
    operands: str

    @property
    def jumps_to(self) -> int | None:
        """The address that a branch may go to; None for another instruction."""
        target = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(target[1], 16) if self.name.startswith("BRA") and target else None


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, each counted once, as a warp issues them in one round."""

    instructions: tuple[Instruction, ...]

    def count(self, pattern: re.Pattern[str]) -> int:
        """Instructions whose name begins with a pattern."""
        return sum(bool(pattern.match(instruction.name)) for instruction in self.instructions)

    @property
    def tensor_cores(self) -> set[str]:
        """The kinds of tensor-core instructions."""
        matches = (TENSOR_CORE.match(instruction.name) for instruction in self.instructions)
        return {match[1] for match in matches if match}

    @property
    def exponentials(self) -> int:
        return self.count(re.compile(r"MUFU\.EX2\b"))

    @property
    def tiles_in_flight(self) -> int | None:
        """Groups of asynchronous loads that the loop leaves in flight where it waits.

        With 0 it waits for what it has just asked for. None: it waits for none.
        """
        waits = [
            int(instruction.operands.rpartition("0x")[2], 16)
            for instruction in self.instructions
            if instruction.name == "DEPBAR.LE" and "0x" in instruction.operands
        ]
        return min(waits, default=None)


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of stack and local memory of a thread.
        instructions: all of them, in order.
    """

    registers: int
    spilled: int
    instructions: tuple[Instruction, ...]

    @property
    def local_accesses(self) -> int:
        """Loads from and stores to local memory."""
        return Loop(self.instructions).count(LOCAL_ACCESS)

    def loops(self) -> list[Loop]:
        """All loops, inner ones before those around them."""
        loops = []
        for end, instruction in enumerate(self.instructions):
            target = instruction.jumps_to
            # The last instruction of a kernel jumps to itself.
            if target is not None and target < instruction.address:
                addresses = (other.address for other in self.instructions)
                begin = next(i for i, address in enumerate(addresses) if address >= target)
                loops.append(Loop(self.instructions[begin : end + 1]))
        return loops

    def outer_loops(self) -> list[Loop]:
        """The loops that are in no other, in order."""
        outer: list[Loop] = []
        for loop in self.loops():
            first = loop.instructions[0].address
            outer = [other for other in outer if other.instructions[0].address < first] + [loop]
        return outer

    def loop_of(self, pattern: re.Pattern[str]) -> Loop | None:
        """The loop with most instructions of a pattern, and of several the shortest."""
        best: tuple[tuple[int, int], Loop] | None = None
        for loop in self.loops():
            count = loop.count(pattern)
            rank = count, -len(loop.instructions)
            if count and (best is None or rank > best[0]):
                best = rank, loop
        return best[1] if best else None


def disassemble(cubin: bytes, whole: bool = True) -> MachineCode:
    """Disassemble a kernel; if not as a whole, which takes long, its resources alone."""
    wanted = ["-sass", "-res-usage"] if whole else ["-res-usage"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        output = subprocess.run(
            [str(CUOBJDUMP), *wanted, str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
    return parse(output.stdout.splitlines(), output.stdout + output.stderr)


def parse(lines: Sequence[str], resources: str) -> MachineCode:
    """Read the lines of a disassembly, and the resources from the text that states them."""
    usage = {name: int(value) for name, value in RESOURCE.findall(resources)}
    instructions = tuple(
        Instruction(int(match[1], 16), match[2], match[3].strip())
        for match in map(INSTRUCTION.match, lines)
        if match
    )
    return MachineCode(usage["REG"], usage["STACK"] + usage["LOCAL"], instructions)
