"""Check and time the fused eviction on a GPU. Needs torch and Triton alone, and no installation.

    python benchmarks/kernels/eviction.py           on a GPU
    python benchmarks/kernels/eviction.py --smoke   on a CPU, under Triton's interpreter: no numbers

Correctness comes first: unless every head agrees with the reference, nothing is timed. Then, at the
shape of Qwen3-8B (36 layers, 8 KV heads, D = 128, G = 4, W = 64, bf16), the fused eviction is timed
beside the authors' method in PyTorch, the same under torch.compile, R-KV's rule, and the floor: the
bytes at measured copy bandwidth or the operations at measured matmul rate, whichever takes longer.
The policies random and streaming, which score no attention, are timed on the same pages.
Writes JSON and Markdown to benchmarks/results/kernels/.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
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

from benchmarks.kernels import baselines  # noqa: E402
from benchmarks.kernels.eviction_report import markdown, number  # noqa: E402
from benchmarks.kernels.workload import Shape, Workload, ring_is_right, wrong_heads  # noqa: E402
from vase_vllm.kernels.launch import (  # noqa: E402
    SCRATCH_BYTES,
    device_limits,
    plan_launch,
    scoring_tile,
)
from vase_vllm.kernels.parameters import EvictionParameters  # noqa: E402
from vase_vllm.kernels.ring import TritonRingWrite  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernels"
BUDGETS = (1024, 2048, 4096, 8192)
DUE = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (16, 64, 128, 256)
SPLITS = (1, 2, 4, 8, 16)
MEMORY_SHARE = 0.85
"""Share of the free memory that a measurement may fill."""


def parameters_of(budget: int) -> EvictionParameters:
    """The paper's parameters: a window of 64, a quarter of the budget protected."""
    return EvictionParameters(budget, 64, budget // 4)


def snapkv(parameters: EvictionParameters) -> EvictionParameters:
    """The policy ``snapkv``, with the same budget, window and sinks."""
    return replace(parameters, protected=parameters.sinks, sampling="greedy")


def unscored(parameters: EvictionParameters) -> dict[str, EvictionParameters]:
    """The policies that score no attention, with the same budget, window and sinks."""
    sinks = parameters.sinks
    return {
        "random": replace(parameters, protected=sinks, sampling="gumbel", scoring="uniform"),
        "streaming": replace(parameters, protected=sinks, sampling="greedy", scoring="age"),
    }


def correctness_shapes() -> dict[str, Shape]:
    """Small shapes that reach every path of the kernels."""
    base = Shape(EvictionParameters(256, 16, 64), 2, 2, 2, 2, 64)
    if SMOKE:
        base = replace(base, parameters=EvictionParameters(40, 8, 10), num_layers=1)
        shapes = {"vase": base, "fp32, long": replace(base, dtype=torch.float32, extra=40)}
        shapes["snapkv"] = replace(base, parameters=snapkv(base.parameters))
        for name, parameters in unscored(base.parameters).items():
            shapes[name] = replace(base, parameters=parameters)
        return {f"smoke, {name}": shape for name, shape in shapes.items()}
    qwen3 = Shape(parameters_of(1024), num_due=2, num_layers=2)
    greedy = replace(base.parameters, sampling="greedy")
    shapes = {
        "Qwen3-8B": qwen3,
        "Qwen3-8B, budget 4096": replace(qwen3, parameters=parameters_of(4096)),
    }
    shapes |= {f"{dtype}": replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)}
    shapes |= {f"D={size}": replace(base, head_size=size) for size in (96, 128, 192, 256)}
    shapes |= {f"G={size}": replace(qwen3, group_size=size) for size in (1, 5, 8, 16)}
    shapes |= {f"block={size}": replace(base, block_size=size) for size in (32, 64, 128)}
    shapes |= {f"extra={extra}": replace(base, extra=extra) for extra in (16, 240, 4000)}
    shapes["HND"] = replace(base, layout="HND")
    shapes["greedy"] = replace(base, parameters=greedy)
    shapes["snapkv"] = replace(qwen3, parameters=snapkv(qwen3.parameters))
    for name, parameters in unscored(parameters_of(4096)).items():
        shapes[name] = replace(qwen3, parameters=parameters)
    long = replace(base, dtype=torch.float32, extra=4000)
    for name, parameters in unscored(base.parameters).items():
        shapes[f"{name}, fp32, extra=4000"] = replace(long, parameters=parameters)
    shapes["odd budget"] = replace(base, parameters=EvictionParameters(501, 13, 77))
    return shapes


def check(device: torch.device) -> list[str]:
    """Names of the shapes with heads that are not right."""
    failed = []
    for name, shape in correctness_shapes().items():
        for num_splits in (None, 3):
            torch.manual_seed(0)
            num_wrong = wrong_heads(shape, device, num_splits)
            print(f"  {name}, splits {num_splits or 'counted'}: {num_wrong} wrong heads")
            failed += [name] if num_wrong else []
        if not ring_is_right(shape, device):
            failed.append(f"{name} (query ring)")
    return failed


def median_ms(function: Callable[[], Any]) -> float:
    """Median time of a call with a cold L2; in a smoke run, one call and no number."""
    if SMOKE:
        function()
        return float("nan")
    return triton.testing.do_bench(function, warmup=50, rep=300, return_mode="median")


def machine_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy, read and written, and FLOP per second of a bf16 matmul."""
    size, order = (2**12, 64) if SMOKE else (2**30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / median_ms(lambda: target.copy_(source)) * 1e3
    matrix = torch.randn(order, order, device=device, dtype=torch.bfloat16)
    return copied, 2 * order**3 / median_ms(lambda: matrix @ matrix) * 1e3


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether so many more bytes fit on the device."""
    if SMOKE:
        return True
    torch.cuda.empty_cache()
    return num_bytes <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]


def time_baselines(shape: Shape, device: torch.device) -> dict[str, float | None]:
    """Milliseconds of each baseline over all layers; None where memory does not suffice."""
    names = ("authors", "authors, compiled", "R-KV's rule")
    batch, heads, rows = shape.num_due, shape.num_kv_heads, shape.num_query_rows
    per_layer = shape.cache_bytes // shape.num_layers
    logits = batch * heads * rows * shape.num_candidates * 4
    # Enough layers that none is found in L2 again; each is then used for several.
    num_buffers = max(1, min(shape.num_layers, 2**28 // per_layer))
    if not fits(num_buffers * per_layer + 2 * per_layer + 4 * logits, device):
        return dict.fromkeys(names)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=shape.dtype)

    sizes = (batch, heads, shape.num_cached, shape.head_size)
    buffers = [(randn(*sizes), randn(*sizes)) for _ in range(num_buffers)]
    queries = randn(batch, heads, rows, shape.head_size)
    authors = baselines.authors_eviction(shape.parameters)
    methods = (
        authors,
        torch.compile(authors, backend="eager" if SMOKE else "inductor"),
        baselines.rkv_eviction(shape.parameters),
    )

    def all_layers(evict: baselines.Eviction) -> None:
        for layer in range(shape.num_layers):
            evict(*buffers[layer % num_buffers], queries)

    return {
        name: median_ms(lambda evict=evict: all_layers(evict))
        for name, evict in zip(names, methods, strict=True)
    }


def time_shape(shape: Shape, device: torch.device, rates: tuple[float, float]) -> dict[str, Any]:
    """One row of the table of evictions."""
    floors = shape.least_bytes / rates[0] * 1e3, shape.least_flop / rates[1] * 1e3
    result: dict[str, Any] = {
        "budget": shape.parameters.budget,
        "due": shape.num_due,
        "fused": None,
        "random": None,
        "streaming": None,
        "floor": max(floors),
        "floor of memory": floors[0],
        "floor of matmul": floors[1],
    }
    if fits(shape.cache_bytes + 2**28, device):
        workload = Workload(shape, device)
        result["fused"] = median_ms(workload.evict)
        for name, parameters in unscored(shape.parameters).items():
            result[name] = median_ms(lambda policy=parameters: workload.evict(parameters=policy))
        if shape.num_due <= 2:
            result["splits"] = {
                splits: median_ms(lambda splits=splits: workload.evict(splits)) for splits in SPLITS
            }
        del workload
    return result | time_baselines(shape, device)


def time_decode(shape: Shape, batch: int, device: torch.device) -> float | None:
    """Milliseconds of the attention of one decode step, all layers, at the mean cached length."""
    length = shape.parameters.budget + shape.parameters.window // 2
    sizes = (batch, shape.num_kv_heads, length, shape.head_size)
    num_bytes = 2 * batch * shape.num_kv_heads * length * shape.head_size * shape.dtype.itemsize
    if not fits(num_bytes, device):
        return None
    keys, values = (torch.randn(sizes, device=device, dtype=shape.dtype) for _ in range(2))
    queries = keys[:, :, : shape.group_size].clone()
    return shape.num_layers * median_ms(lambda: baselines.decode_attention(queries, keys, values))


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

    all_layers()
    if SMOKE:
        return float("nan")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_layers()
    return median_ms(graph.replay)


def amortised(
    rows: list[dict[str, Any]], decode: dict[int, float | None], ring: dict[int, float]
) -> list[dict[str, Any]]:
    """Cost of evictions per decode step: on average batch / 64 sequences are due in each."""
    table = []
    times = {row["due"]: row["fused"] for row in rows}
    for batch, step in decode.items():
        mean_due = batch / 64
        due = max((d for d in times if d <= max(1, mean_due)), default=None)
        if due is None or times[due] is None or step is None:
            continue
        cost = times[due] * mean_due / due
        table.append(
            {
                "batch": batch,
                "due": mean_due,
                "cost": cost,
                "ring": ring[batch],
                "decode": step,
                "share": (cost + ring[batch]) / step,
            }
        )
    return table


def main() -> int:
    """1 if a head is not right."""
    parser = argparse.ArgumentParser(description="Check and time the fused eviction on a GPU.")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU, without numbers")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--due", type=int, nargs="+", default=DUE, help="sequences that evict")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--out", type=Path, help="directory, default benchmarks/results/kernels")
    options = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        parser.error("no GPU: --smoke runs all of this on a CPU, without numbers")
    device = torch.device("cpu" if SMOKE else "cuda")
    shape = Shape(parameters_of(4096))
    if SMOKE:
        shape = Shape(EvictionParameters(40, 8, 10), 1, 1, 2, 2, 64)
        options.budgets, options.due, options.batches = (40,), (1, 2), (2,)

    print("correctness, against the reference in fp32:")
    if failed := check(device):
        print(f"FAILED, nothing is timed: {', '.join(failed)}")
        return 1
    rates, limits = machine_rates(device), device_limits(device)
    evictions, shares = [], {}
    for budget in options.budgets:
        parameters = shape.parameters if SMOKE else parameters_of(budget)
        sized = replace(shape, parameters=parameters)
        rows, num_query_rows = [], sized.num_query_rows
        tile = scoring_tile(num_query_rows, shape.head_size, shape.dtype.itemsize, limits)
        for num_due in options.due:
            row = time_shape(replace(sized, num_due=num_due), device, rates)
            num_tasks = row["due"] * shape.num_layers * shape.num_kv_heads
            plan = plan_launch(num_tasks, budget, num_query_rows, SCRATCH_BYTES, tile, limits)
            row["counted"] = plan.num_splits
            print(f"  budget {budget}, {num_due} due: fused {number(row['fused'])} ms", flush=True)
            rows.append(row)
        evictions += rows
        decode = {batch: time_decode(sized, batch, device) for batch in options.batches}
        ring = {batch: time_ring(sized, batch, device) for batch in options.batches}
        shares[budget] = amortised(rows, decode, ring)

    device_name = platform.processor() if SMOKE else torch.cuda.get_device_name(device)
    report = {
        "smoke": SMOKE,
        "device": "smoke run, no GPU" if SMOKE else device_name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.argv]),
        "shape": "smoke"
        if SMOKE
        else "36 layers, 8 KV heads, D=128, G=4, W=64, block 16, bf16, NHD pages",
        "copy bytes/s": rates[0],
        "matmul flop/s": rates[1],
        "evictions": evictions,
        "amortised": shares,
    }
    directory = options.out or (Path(tempfile.mkdtemp()) if SMOKE else RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    name = "smoke" if SMOKE else device_name.lower().replace(" ", "-")
    path = directory / f"eviction-{name}-{report['date']}"
    text = markdown(report)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text)
    print(f"written to {path}.json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
