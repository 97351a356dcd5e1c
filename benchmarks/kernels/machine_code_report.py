"""The tables of ``compile_check.py``, and what of them is recorded."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import triton

RECORD = Path(__file__).parents[1] / "results" / "kernels" / "machine_code"


@dataclass(frozen=True)
class Row:
    """What came out for one kernel.

    Attributes:
        kernel, configuration, arch: which.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        spilled: bytes of a thread.
        programs: that an SM holds at once.
        tensor: kind of tensor-core instructions of the loop over K tiles.
        loads: asynchronous loads of 128 bits in it.
        ahead: K tiles that it leaves in flight where it waits.
        issued: instructions of one round of it; of ``select_and_move`` and
            ``window_whitening`` all that a warp issues.
    """

    kernel: str
    configuration: str
    arch: str
    warps: int
    registers: int
    shared: int
    spilled: int
    programs: int
    tensor: str = ""
    loads: int | None = None
    ahead: int | None = None
    issued: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.configuration, self.arch

    def line(self) -> str:
        """The row of the table."""
        cells = ["" if cell is None else str(cell) for cell in astuple(self)]
        return TABLE.format(*cells).rstrip()


TABLE = "{:18} {:33} {:7} {:>5} {:>9} {:>7} {:>7} {:>8} {:>7} {:>5} {:>5} {:>6}"
HEADINGS = [field.name for field in fields(Row)]


@dataclass(frozen=True)
class Prediction:
    """Microseconds of the loops of one launch, of which architecture and policy.

    Attributes:
        parts: of a program that runs several loops, for each its name, its rounds, and what a warp
            issues in a round.
    """

    arch: str
    gpu: str
    policy: str
    launch: str
    microseconds: float
    parts: tuple[tuple[str, int, int], ...] = ()

    @property
    def issued(self) -> int:
        """Instructions of a warp in all parts."""
        return sum(rounds * issued for _, rounds, issued in self.parts)


def over_budget(rows: list[Row], recorded: dict[tuple[str, ...], int]) -> Iterator[str]:
    """The kernels that issue more than was recorded."""
    for row in rows:
        if row.issued is None:
            continue
        budget = recorded.get(row.key)
        if budget is None:
            yield f"{' '.join(row.key)}: no length is recorded; run with --record"
        elif row.issued > budget:
            yield f"{' '.join(row.key)}: {row.issued} instructions issued, {budget} recorded"


def prediction_lines(predictions: list[Prediction]) -> Iterator[str]:
    """The sum of each policy on each architecture, and the parts of the launches that have any."""
    for policy, arch in dict.fromkeys((one.policy, one.arch) for one in predictions):
        alike = [one for one in predictions if (one.policy, one.arch) == (policy, arch)]
        parts = ", ".join(f"{part.launch} {part.microseconds:.0f}" for part in alike)
        total = sum(part.microseconds for part in alike)
        yield f"{policy:8} {arch:7} {alike[0].gpu:10} {total:5.0f} us: {parts}"
    yield ""
    for one in predictions:
        if one.parts:
            parts = ", ".join(f"{name} {rounds} * {issued}" for name, rounds, issued in one.parts)
            yield f"{one.policy:8} {one.arch:7} {one.launch}: {one.issued} issued: {parts}"


def recorded_lengths() -> dict[tuple[str, ...], int]:
    """Instructions per K tile of every loop, as they were recorded."""
    path = RECORD.with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row["kernel"], row["configuration"], row["arch"]): row["issued"] for row in rows}


def recorded_by_this_triton() -> bool:
    """Whether the lengths were recorded with the installed version of Triton."""
    path = RECORD.with_suffix(".json")
    return path.exists() and json.loads(path.read_text())["triton"] == triton.__version__


def record(heading: str, rows: list[Row], predictions: list[Prediction]) -> None:
    """Write what came out, as data and as text."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "triton": triton.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "rows": [asdict(row) for row in rows],
        "predictions": [asdict(prediction) for prediction in predictions],
    }
    RECORD.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = [
        "# The kernels' machine code",
        "",
        f"{heading}; `{report['command']}`. What the columns and the prediction are:",
        "[compile_check.py](../../kernels/compile_check.py),",
        "[prediction.py](../../kernels/prediction.py). That for the H200 was compared with one.",
        "",
        "```",
        *prediction_lines(predictions),
        "",
        TABLE.format(*HEADINGS).rstrip(),
        *(row.line() for row in rows),
        "```",
    ]
    RECORD.with_suffix(".md").write_text("\n".join(text) + "\n")
