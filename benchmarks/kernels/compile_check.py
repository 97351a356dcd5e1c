"""Compile the shipped kernel configurations for several GPUs, without one, and look at the code.

    python benchmarks/kernels/compile_check.py           all configurations and architectures
    python benchmarks/kernels/compile_check.py --quick   the Qwen3-8B shape for sm_90, all scorings
    python benchmarks/kernels/compile_check.py --device  all, for the GPU of this machine
    python benchmarks/kernels/compile_check.py --record  all, and write what came out as the budget

The launches are those of the launchers themselves, on tensors without storage. A line per kernel
says what it takes of an SM, and what a warp issues: for one tile of the loop over K tiles; for all
of its work in ``select_and_move`` and ``window_whitening``. Fails if

- a kernel spills registers or needs more shared memory than there is;
- fewer programs share an SM than the launcher counts on;
- a loop over K tiles does not use the tensor cores of its architecture, or loads keys in anything
  but asynchronous copies of 128 bits, or waits for a copy that it has just started;
- more is issued than was recorded in benchmarks/results/kernels/; with --device not where that was
  recorded with another version of Triton.

A second table predicts what an eviction of one sequence of Qwen3-8B takes (``prediction.py``) under
``vase`` and under ``distinct``: scoring, selection and moves.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks.common.exit_codes import SKIPPED  # noqa: E402
from benchmarks.kernels.launch_prediction import (  # noqa: E402
    has_parts,
    predict_parts,
    predict_scoring,
)
from benchmarks.kernels.machine_code import (  # noqa: E402
    FUSED_MULTIPLY_ADD,
    TENSOR_CORE,
    WIDE_ASYNC_LOAD,
    Loop,
    MachineCode,
    disassemble,
)
from benchmarks.kernels.machine_code_report import (  # noqa: E402
    HEADINGS,
    TABLE,
    Prediction,
    Row,
    over_budget,
    prediction_lines,
    record,
    recorded_by_this_triton,
    recorded_lengths,
)
from benchmarks.kernels.prediction import GPUS, programs_per_sm  # noqa: E402
from benchmarks.kernels.shipped import (  # noqa: E402
    ARCHITECTURES,
    CONFIGURATIONS,
    QUICK,
    QWEN3_8B,
    QWEN3_8B_DISTINCT,
    Configuration,
    shipped_launches,
    source_of,
)
from vase_vllm.kernels.distinctness import token_distinctness  # noqa: E402
from vase_vllm.kernels.launch import DeviceLimits, Launch  # noqa: E402
from vase_vllm.kernels.remap import remap_sequences  # noqa: E402
from vase_vllm.kernels.ring import store_ring  # noqa: E402
from vase_vllm.kernels.scoring import candidate_scores, row_statistics  # noqa: E402
from vase_vllm.kernels.selection import select_and_move  # noqa: E402
from vase_vllm.kernels.whitening import window_whitening  # noqa: E402

SCORING = (row_statistics, candidate_scores, token_distinctness)
PREDICTED = {QWEN3_8B: "vase", QWEN3_8B_DISTINCT: "distinct"}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The tensor-core instruction of each architecture."""


def compile_launch(launch: Launch, architecture: int, whole: bool) -> tuple[MachineCode, int, int]:
    """The machine code of a launch's kernel, its bytes of shared memory, and its warps.

    Args:
        whole: else without instructions.
    """
    source, options = source_of(launch)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    metadata = compiled.metadata
    code = disassemble(compiled.asm["cubin"], whole)
    return code, metadata.shared, metadata.num_warps


def key_loop(launch: Launch, code: MachineCode) -> Loop | None:
    """The loop over tiles of K, or of V, of a kernel that scores."""
    if launch.kernel not in SCORING:
        return None
    return code.loop_of(FUSED_MULTIPLY_ADD if launch.arguments["EXACT"] else TENSOR_CORE)


def look_at(
    configuration: Configuration, architecture: int
) -> tuple[list[Row], list[str], list[Prediction]]:
    """Compile a configuration for an architecture.

    Returns:
        A row for each kernel, what is wrong with any of them, and predictions if the configuration
        is that of Qwen3-8B.
    """
    limits, gpu = ARCHITECTURES[architecture], GPUS[architecture]
    launches = list(shipped_launches(configuration, limits))
    rows, wrong, predictions = [], [], []
    # Launches that differ in numbers alone are one kernel.
    kernels: dict[Any, Launch] = {}
    for launch in launches:
        kernels.setdefault(launch.kernel, launch)
    for launch in kernels.values():
        if launch.kernel in (select_and_move, remap_sequences) and configuration.repeats():
            continue
        if launch.kernel in (store_ring, remap_sequences) and configuration.is_distinct:
            # Those of another configuration.
            continue
        of_others = (candidate_scores, window_whitening, token_distinctness)
        if configuration.memory and launch.kernel in of_others:
            # Those of the configuration without memory.
            continue
        if configuration.strata > 1 and launch.kernel is not select_and_move:
            # Those of the configuration without strata.
            continue
        by_parts = has_parts(launch) and configuration in PREDICTED
        whole = launch.kernel in SCORING or by_parts
        code, shared, num_warps = compile_launch(launch, architecture, whole)
        loop = key_loop(launch, code)
        row = Row(
            launch.kernel.__name__,
            str(configuration),
            f"sm_{architecture}",
            num_warps,
            code.registers,
            shared,
            code.spilled,
            programs_per_sm(code.registers, shared, num_warps, gpu),
            **({} if loop is None else of_loop(loop)),
        )
        reasons = [*resource_reasons(row, code, limits)]
        if by_parts:
            try:
                prediction = predict_parts(PREDICTED[configuration], launch, code, row, gpu)
            except ValueError as error:
                reasons.append(str(error))
            else:
                row = replace(row, issued=prediction.issued)
                predictions.append(prediction)
        rows.append(row)
        if launch.kernel in SCORING:
            tile = configuration.tile(limits)
            reasons += loop_reasons(row, launch, architecture, tile.programs_per_sm)
        wrong += [f"{' '.join(row.key)}: {reason}" for reason in reasons]
        if configuration in PREDICTED and loop is not None:
            policy = PREDICTED[configuration]
            predictions.append(predict_scoring(policy, launch, launches, loop, row, gpu))
    return rows, wrong, predictions


def of_loop(loop: Loop) -> dict[str, Any]:
    """The columns of a loop over K tiles."""
    return dict(
        tensor=" ".join(sorted(loop.tensor_cores)),
        loads=loop.count(WIDE_ASYNC_LOAD),
        ahead=loop.tiles_in_flight,
        issued=len(loop.instructions),
    )


def resource_reasons(row: Row, code: MachineCode, limits: DeviceLimits) -> Iterator[str]:
    """What of an SM a kernel takes that it must not."""
    if row.spilled or code.local_accesses:
        yield f"{row.spilled} bytes and {code.local_accesses} instructions of local memory"
    if row.shared > limits.shared_memory:
        yield f"{row.shared} bytes of shared memory, and there are {limits.shared_memory}"


def loop_reasons(
    row: Row, launch: Launch, architecture: int, expected_programs: int
) -> Iterator[str]:
    """What is wrong with the loop over K tiles of a kernel that scores."""
    if row.issued is None:
        yield "no loop over K tiles was found"
        return
    if row.programs < expected_programs:
        yield f"{row.programs} programs on an SM, and the launcher counts on more"
    if launch.arguments.get("EXACT"):
        # Products in fp32 have no tensor cores, and their tiles are small.
        return
    if row.tensor != TENSOR_CORES[architecture]:
        yield f"{row.tensor or 'no'} tensor cores instead of {TENSOR_CORES[architecture]}"
    if not row.loads:
        yield "no asynchronous load of 128 bits"
    if not row.ahead:
        yield "waits for the keys that it has just asked for"


def device_architecture() -> int:
    """Of this machine's GPU: 90 for sm_90.

    Raises:
        SystemExit: there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--device: no GPU; --arch names an architecture")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main() -> int:
    """Print the tables; 1 if a kernel is not as it should be, ``SKIPPED`` for an unknown GPU."""
    parser = argparse.ArgumentParser(
        description="Compile the shipped kernels for several GPUs, without one."
    )
    parser.add_argument("--quick", action="store_true", help="Qwen3-8B's shape on sm_90 only")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, metavar="SM")
    parser.add_argument("--device", action="store_true", help="for the GPU of this machine only")
    parser.add_argument("--record", action="store_true", help="write what comes out as the budget")
    options = parser.parse_args()
    configurations = QUICK if options.quick else CONFIGURATIONS
    if options.device:
        options.arch = [device_architecture()]
        if options.arch[0] not in ARCHITECTURES:
            known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
            print(f"this machine's sm_{options.arch[0]} is none of {known}")
            return SKIPPED
    architectures = options.arch or ([90] if options.quick else list(ARCHITECTURES))
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if options.record and (options.quick or options.arch):
        parser.error("--record is for all configurations and architectures")

    heading = f"Triton {triton.__version__}, torch {torch.__version__}"
    print(heading)
    print(TABLE.format(*HEADINGS).rstrip())
    started, rows, wrong, predictions = time.monotonic(), [], [], []
    work = [(c, architecture) for c in configurations for architecture in architectures]
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for of_rows, reasons, of_launches in pool.map(look_at, *zip(*work, strict=True)):
            rows += of_rows
            wrong += reasons
            predictions += of_launches
            for row in of_rows:
                print(row.line(), flush=True)
    if options.record:
        record(heading, rows, predictions)
    if not options.device or recorded_by_this_triton():
        wrong += over_budget(rows, recorded_lengths())
    print("\nan eviction from one sequence of Qwen3-8B at budget 4096, predicted:")
    print(*prediction_lines(predictions), sep="\n")
    print(*(f"FAILED {reason}" for reason in wrong), sep="\n")
    print(f"{time.monotonic() - started:.0f} s, {len(wrong)} failed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
