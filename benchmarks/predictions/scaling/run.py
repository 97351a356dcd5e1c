"""Step times that vase_vllm/tools/plan/cost.py predicts, against those measured on this CPU.

    python -m benchmarks.predictions.scaling.run

Two engines, full cache and eviction, stay up and take turns. Two numbers are fitted, to the full
cache's cells: the bandwidth and the fixed overhead of a step. The peak is that of a matrix product
of an eviction's size, measured by itself. The cells with eviction are predicted with the same
three. Times are seconds of the processor in a single-threaded engine: the
clock would time the other users of a shared machine (it is in the JSON too).
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.common import paths
from benchmarks.common.provenance import provenance
from benchmarks.predictions.scaling.engine import Cell, Engine, engine
from benchmarks.predictions.scaling.plot import plot
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.plan.cost import Machine, Shard, Step
from vase_vllm.tools.plan.model_shape import read_model_shape
from vase_vllm.tools.tiny_model import make_tiny_model

RESULTS = paths.RESULTS / "predictions" / "scaling"
SHAPE = {"layers": 4, "hidden_size": 256, "query_heads": 8, "kv_heads": 4, "head_dim": 64}
SCHEDULE = EvictionSchedule(budget=1024, window=64)
BATCHES, LENGTHS = (1, 2, 4, 8), (256, 1024, 2048, 4096)
STEPS = 16
FULL = [Cell(batch, n, warm=2, steps=STEPS) for batch in BATCHES for n in LENGTHS]
# Evictions fall due at T + W; two whole periods are timed after the first.
EVICTING = [
    Cell(batch, SCHEDULE.budget, warm=SCHEDULE.window + 4, steps=2 * SCHEDULE.window)
    for batch in BATCHES
]


Times = list[dict[str, list[float]]]
Runs = dict[str, list[Times]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats of every cell")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_model(directory, **SHAPE, dtype="float32")
        shard = Shard(read_model_shape(directory, "float32")[0])
        runs, peak = measure(str(model), args.rounds)
    report = evaluate(shard, runs, peak)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cpu.json").write_text(json.dumps(rounded(report)) + "\n")
    plot(report, args.output / "cpu")
    for cell in report["cells"]:
        print(
            "{policy:5} batch {batch:2} length {length:5}: measured {measured_ms:7.2f} ms, "
            "predicted {predicted_ms:7.2f} ms ({error:+.0%})".format(**cell)
        )
    print(json.dumps(report["summary"], indent=1))
    return 0


def measure(model: str, rounds: int) -> tuple[Runs, float]:
    """Times by policy, cell and round, and the peak; a first round fills the prefix cache."""
    common = {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 8192,
        "kv_cache_memory_bytes": 384 << 20,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    eviction = {"policy": "vase", "budget": SCHEDULE.budget, "window": SCHEDULE.window}
    runs: Runs = {
        "full": [[] for _ in FULL],
        "vase": [[] for _ in EVICTING],
    }
    with (
        engine(common) as full,
        engine(common | {"additional_config": {"kv_eviction": eviction}}) as vase,
        Progress() as progress,
    ):
        task = progress.add_task("measuring", total=(rounds + 1) * (len(FULL) + len(EVICTING)))

        def take(source: Engine, policy: str, index: int, cell: Cell, record: bool) -> None:
            times = source.measure(cell)
            if record:
                runs[policy][index].append(times)
            progress.advance(task)

        for number in range(rounds + 1):
            for index, cell in enumerate(FULL):
                take(full, "full", index, cell, number > 0)
                if index % len(LENGTHS) == 0:
                    turn = index // len(LENGTHS)
                    take(vase, "vase", turn, EVICTING[turn], number > 0)
        return runs, full.measure_peak()


def evaluate(shard: Shard, runs: Runs, peak: float) -> dict[str, Any]:
    """Fit bandwidth and overhead to the full cache, predict everything."""
    steps = [full_step(shard, cell) for cell in FULL]
    measured = [typical(times) for times in runs["full"]]
    machine = fit(steps, measured, peak)
    cells = [
        cell_report("full", cell, shard_step.seconds(machine), times)
        for cell, shard_step, times in zip(FULL, steps, runs["full"], strict=True)
    ]
    cells += [
        cell_report("vase", cell, evicting_step(shard, cell).seconds(machine), times)
        for cell, times in zip(EVICTING, runs["vase"], strict=True)
    ]
    errors = {
        policy: [abs(cell["error"]) for cell in cells if cell["policy"] == policy]
        for policy in ("full", "vase")
    }
    return {
        **provenance(),
        "threads": 1,
        "shape": asdict(shard.model),
        "budget": SCHEDULE.budget,
        "window": SCHEDULE.window,
        "summary": {
            "fitted_bandwidth_gb_per_s": machine.bandwidth / 1e9,
            "fitted_overhead_ms": machine.overhead * 1e3,
            "measured_peak_gflop_per_s": peak / 1e9,
            "median_error_full": statistics.median(errors["full"]),
            "worst_error_full": max(errors["full"]),
            "median_error_vase": statistics.median(errors["vase"]),
            "worst_error_vase": max(errors["vase"]),
        },
        "cells": cells,
        "runs_seconds": runs,
    }


def rounded(value: Any) -> Any:
    """Floats with 5 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def full_step(shard: Shard, cell: Cell) -> Step:
    return shard.step(cell.batch, cell.prompt + cell.warm + cell.steps / 2)


def evicting_step(shard: Shard, cell: Cell) -> Step:
    """The mean of a sawtooth from T + 1 to T + W."""
    cached = SCHEDULE.budget + (SCHEDULE.window + 1) / 2
    return shard.step(cell.batch, cached, SCHEDULE)


def typical(times: Times, clock: str = "cpu") -> float:
    """Seconds of a step: the median over rounds of the median over steps."""
    return statistics.median(statistics.median(round_[clock]) for round_ in times)


def with_evictions(times: Times, clock: str = "cpu") -> float:
    """Seconds of a step whose evictions are spread evenly: the median over rounds of the mean."""
    return statistics.median(statistics.fmean(round_[clock]) for round_ in times)


def fit(steps: list[Step], measured: list[float], peak: float) -> Machine:
    """Bandwidth and overhead, by least squares of the relative error.

    ``seconds = overhead + bytes / bandwidth + operations / peak``, where a part of a step counts
    by its bytes or by its operations, whichever takes longer; repeated until that is settled.
    """
    seconds = np.array(measured)
    machine = Machine(bandwidth=1e10, peak=peak)
    for _ in range(10):
        num_bytes, computing = np.zeros_like(seconds), np.zeros_like(seconds)
        for index, step in enumerate(steps):
            for part in step.parts:
                if part.num_bytes / machine.bandwidth >= part.operations / peak:
                    num_bytes[index] += part.num_bytes
                else:
                    computing[index] += part.operations / peak
        columns = np.stack([1 / seconds, num_bytes / seconds], axis=1)
        overhead, per_byte = np.linalg.lstsq(columns, 1 - computing / seconds, rcond=None)[0]
        machine = Machine(bandwidth=float(1 / per_byte), peak=peak, overhead=float(overhead))
    return machine


def cell_report(policy: str, cell: Cell, predicted: float, times: Times) -> dict[str, Any]:
    average = with_evictions if policy == "vase" else typical
    measured = average(times)
    return {
        "policy": policy,
        "batch": cell.batch,
        "length": cell.prompt + cell.warm,
        "measured_ms": measured * 1e3,
        "measured_between_evictions_ms": typical(times) * 1e3,
        "measured_wall_ms": average(times, "wall") * 1e3,
        "rounds_ms": [average([round_]) * 1e3 for round_ in times],
        "predicted_ms": predicted * 1e3,
        "error": predicted / measured - 1,
    }


if __name__ == "__main__":
    sys.exit(main())
