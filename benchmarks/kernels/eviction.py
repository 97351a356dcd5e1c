"""Check and time the fused eviction on a GPU. Needs torch and Triton alone, and no installation.

    python benchmarks/kernels/eviction.py               on a GPU
    python benchmarks/kernels/eviction.py --check-only  compare with the reference, time nothing
    python benchmarks/kernels/eviction.py --minutes 5   end in time; the same command goes on
    python benchmarks/kernels/eviction.py --smoke       on a CPU, interpreted, without numbers

Correctness comes first: unless every head agrees with the reference, nothing is timed. Then, at the
shape of Qwen3-8B (36 layers, 8 KV heads, D = 128, G = 4, W = 64, bf16), the fused eviction is timed
beside the authors' method in PyTorch, the same under torch.compile, R-KV's rule, and the floor: the
bytes at measured copy bandwidth or the operations at measured matmul rate, whichever takes longer.
The policies random and streaming, which score no attention, and distinct, which takes two launches
more, are timed on the same pages.

Each row is written to benchmarks/results/kernels/ as soon as it is measured. What is there of the
same device, versions, settings and kernels is not measured again.
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402

from benchmarks.common.clock import Clock, OutOfTimeError  # noqa: E402
from benchmarks.common.exit_codes import OUT_OF_TIME  # noqa: E402
from benchmarks.common.provenance import source_digest  # noqa: E402
from benchmarks.common.results import Rows  # noqa: E402
from benchmarks.kernels import baselines, xformers_attention  # noqa: E402
from benchmarks.kernels.correctness import check  # noqa: E402
from benchmarks.kernels.eviction_report import markdown, number  # noqa: E402
from benchmarks.kernels.policies import distinct, parameters_of, unscored  # noqa: E402
from benchmarks.kernels.timing import (  # noqa: E402
    fits,
    machine_rates,
    milliseconds,
    time_baselines,
)
from benchmarks.kernels.workload import Shape, Workload  # noqa: E402
from vase_vllm.kernels.launch import device_limits, plan_launch, scoring_tile  # noqa: E402
from vase_vllm.kernels.parameters import EvictionParameters  # noqa: E402
from vase_vllm.kernels.ring import TritonRingWrite  # noqa: E402
from vase_vllm.kernels.scratch import SCRATCH_BYTES, HeadScratch  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernels"
BUDGETS = (4096, 1024, 2048, 8192)
DUE = (1, 2, 4, 16, 64)
BATCHES = (16, 64, 256)
COMPILED = [(4096, 1), (4096, 16)]
"""Budgets and due sequences at which the authors' method is compiled: that takes longest of all."""
SPLITS = (1, 2, 4, 8, 16)
SHAPE = "36 layers, 8 KV heads, D=128, G=4, W=64, block 16, bf16, NHD pages"


def time_eviction(shape: Shape, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    """The row of a budget and a number of due sequences."""
    budget, num_due = shape.parameters.budget, shape.num_due
    floors = (
        shape.least_bytes / rates["copy bytes/s"] * 1e3,
        shape.least_flop / rates["matmul flop/s"] * 1e3,
    )
    result: dict[str, Any] = {
        "fused": None,
        "distinct": None,
        "random": None,
        "streaming": None,
        "floor": max(floors),
        "floor of memory": floors[0],
        "floor of matmul": floors[1],
        "counted": counted_splits(shape, device),
    }
    if fits(shape.cache_bytes + 2**28, device):
        workload = Workload(shape, device)
        result["fused"] = milliseconds(workload.evict)
        others = {"distinct": distinct(shape.parameters), **unscored(shape.parameters)}
        for name, parameters in others.items():
            result[name] = milliseconds(lambda policy=parameters: workload.evict(parameters=policy))
        if num_due <= 2:
            result["splits"] = {
                str(splits): milliseconds(lambda splits=splits: workload.evict(splits))
                for splits in SPLITS
            }
        del workload
    print(f"  budget {budget}, {num_due} due: fused {number(result['fused'])} ms", flush=True)
    return result | time_baselines(shape, device, SMOKE or (budget, num_due) in COMPILED)


def counted_splits(shape: Shape, device: torch.device) -> int:
    """The splits of a head that the launcher chooses."""
    limits, num_query_rows = device_limits(device), shape.num_query_rows
    tile = scoring_tile(num_query_rows, shape.head_size, shape.dtype.itemsize, limits)
    head = HeadScratch.of(shape.parameters, shape.group_size, shape.head_size)
    budget = shape.parameters.budget
    return plan_launch(shape.num_heads, budget, head, SCRATCH_BYTES, tile, limits).num_splits


def time_step(shape: Shape, batch: int, device: torch.device) -> dict[str, Any]:
    """The row of a budget and a batch: what is done in every decode step, all layers."""
    print(f"  budget {shape.parameters.budget}, batch {batch}: a decode step", flush=True)
    return {
        "decode": time_decode(shape, batch, device),
        "xformers": xformers_attention.time_decode(shape, batch, device),
        "ring": time_ring(shape, batch, device),
    }


def time_decode(shape: Shape, batch: int, device: torch.device) -> float | None:
    """Milliseconds of the attention of one decode step, all layers, at the mean cached length."""
    length = shape.parameters.budget + shape.parameters.window // 2
    sizes = (batch, shape.num_kv_heads, length, shape.head_size)
    num_bytes = 2 * batch * shape.num_kv_heads * length * shape.head_size * shape.dtype.itemsize
    if not fits(num_bytes, device):
        return None
    keys, values = (torch.randn(sizes, device=device, dtype=shape.dtype) for _ in range(2))
    queries = keys[:, :, : shape.group_size].clone()
    attention = baselines.decode_attention
    return shape.num_layers * milliseconds(lambda: attention(queries, keys, values))


def time_ring(shape: Shape, batch: int, device: torch.device) -> float:
    """Milliseconds of storing the queries of one decode step, all layers in a CUDA graph."""
    workload = Workload(replace(shape, num_due=batch, num_layers=1, extra=0), device)
    num_heads = shape.num_kv_heads * shape.group_size
    query = torch.randn(batch, num_heads, shape.head_size, device=device).to(shape.dtype)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    newest = workload.positions - 1

    def all_layers() -> None:
        for _ in range(shape.num_layers):
            TritonRingWrite(
                newest,
                starts,
                workload.positions,
                workload.block_table,
                window=shape.parameters.window,
            ).store(workload.caches[0], query)

    return milliseconds(all_layers)


def rows_to_time(
    shape: Shape, options: argparse.Namespace, device: torch.device, rates: dict[str, float]
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Every row's key, and what measures it, in the order of their value."""
    for budget in options.budgets:
        parameters = shape.parameters if SMOKE else parameters_of(budget)
        sized = replace(shape, parameters=parameters)
        for num_due in options.due:
            due = replace(sized, num_due=num_due)
            key = {"kind": "eviction", "budget": budget, "due": num_due}
            yield key, lambda due=due: time_eviction(due, device, rates)
        for batch in options.batches:
            key = {"kind": "step", "budget": budget, "batch": batch}
            yield key, lambda sized=sized, batch=batch: time_step(sized, batch, device)


def measure(
    results: Rows, key: dict[str, Any], function: Callable[[], dict[str, Any]], clock: Clock
) -> dict[str, Any]:
    """The row with this key: that of the file, or what the function measures.

    Raises:
        OutOfTimeError: the time is over.
    """
    row = results.find(**key)
    if row is None:
        clock.left()
        row = {"date": datetime.date.today().isoformat(), **function()}
        results.put(key, row)
    return row


def open_results(options: argparse.Namespace, device: torch.device) -> Rows:
    """The file of this device, and of no other one's rows.

    Raises:
        ValueError: it holds rows of other versions or settings.
    """
    device_name = "smoke run, no GPU" if SMOKE else torch.cuda.get_device_name(device)
    header = {
        "smoke": SMOKE,
        "device": device_name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "shape": "smoke" if SMOKE else SHAPE,
    }
    name = "smoke" if SMOKE else device_name.lower().replace(" ", "-")
    results = Rows(options.output / f"eviction-{name}.json", header)
    results.content["command"] = shlex.join(["python", *sys.argv])
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time the fused eviction on a GPU.")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU, without numbers")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check-only", action="store_true", help="time nothing")
    only.add_argument("--skip-check", action="store_true", help="do not look whether it is right")
    parser.add_argument("--minutes", type=float, help="stop in time; call again to go on")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that compare with the reference"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--due", type=int, nargs="+", default=DUE, help="sequences that evict")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--output", type=Path, help="directory of the results, read as well")
    options = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        parser.error("no GPU: --smoke runs all of this on a CPU, without numbers")
    if SMOKE:
        options.budgets, options.due, options.batches = (40,), (1, 2), (2,)
    options.output = options.output or (Path(tempfile.mkdtemp()) if SMOKE else RESULTS)
    return options


def run(options: argparse.Namespace, results: Rows, device: torch.device, clock: Clock) -> None:
    """Check and measure what is not in the results yet.

    Raises:
        SystemExit: a shape is not right.
        OutOfTimeError: the time is over.
    """
    # Rows of other kernels stay in the file, and are told apart.
    stamp = {"kernels": source_digest(ROOT / "vase_vllm" / "kernels")}
    results.content |= stamp
    if not options.skip_check:
        print("correctness, against the reference in fp32:")
        if failed := list(check(results, device, clock, stamp, options.workers)):
            raise SystemExit(f"FAILED, nothing is timed: {', '.join(failed)}")
    if options.check_only:
        return
    shape = Shape(parameters_of(4096))
    if SMOKE:
        shape = Shape(EvictionParameters(40, 8, 10), 1, 1, 2, 2, 64)
    key = {"kind": "rates", **stamp}
    rates = measure(results, key, lambda: machine_rates(device), clock)
    for key, function in rows_to_time(shape, options, device, rates):
        measure(results, key | stamp, function, clock)


def main() -> int:
    """1 if a head is not right, ``OUT_OF_TIME`` if there is more to do."""
    start = time.monotonic()
    options = parse_arguments()
    device = torch.device("cpu" if SMOKE else "cuda")
    state, code = "all rows are there", 0
    try:
        results = open_results(options, device)
    except ValueError as error:
        print(f"FAILED: {error}")
        return 1
    try:
        run(options, results, device, Clock(options.minutes, start))
    except OutOfTimeError as error:
        state, code = f"OUT OF TIME ({error}): the same command goes on", OUT_OF_TIME
    results.write()
    page = markdown(results.content)
    results.path.with_suffix(".md").write_text(page)
    print(page)
    print(f"{state}; results and page are in {options.output}")
    return code


if __name__ == "__main__":
    sys.exit(main())
