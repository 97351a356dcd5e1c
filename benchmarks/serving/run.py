"""Throughput, memory and capacity of eviction against the full cache, on real servers.

    python -m benchmarks.serving.run [--suite cpu] [--workloads NAME ...] [--rounds N]

See README.md in this folder for what is measured and how to read it.
"""

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from vllm.utils.math_utils import cdiv

from benchmarks.common import paths
from benchmarks.common.checks import evictions_so_far, problems
from benchmarks.common.dummy_weights import write_model_files
from benchmarks.common.load import (
    RunFailedError,
    run_load,
    time_per_token,
    warm_up,
)
from benchmarks.common.monitor import Monitor, thinned
from benchmarks.common.prompts import SEED, WARM_UP_SEED, draw_requests
from benchmarks.common.provenance import provenance
from benchmarks.serving import report
from benchmarks.serving.suites import SUITES, Policy, Suite, Workload
from vase_vllm.tools.plan.cost import ModelShape
from vase_vllm.tools.plan.model_shape import read_model_shape
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

RESULTS = paths.RESULTS / "serving"
DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors")
SERIES_POINTS = 200


def prepare_model(suite: Suite, directory: Path) -> list[str]:
    """Write the suite's model to ``directory``; returns what ``vllm serve`` needs to load it."""
    if isinstance(suite.model, dict):
        make_tiny_model(directory, **suite.model)
        return []
    write_model_files(directory, json.loads((suite.model / "config.json").read_text()))
    return ["--load-format", "dummy"]


def kv_memory_bytes(kv_tokens: int, shape: ModelShape, block_size: int) -> int:
    """KV cache memory that holds so many tokens, and vLLM's null block."""
    num_slots = (cdiv(kv_tokens, block_size) + 1) * block_size
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * shape.element_size
    return num_slots * token_bytes


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the servers that the body starts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def facts(log: str) -> dict[str, str]:
    """What the server's log says of its settings; nothing of what it does not say."""
    patterns = {
        "attention_backend": r"Using (\w+) (?:attention )?backend",
        "enforce_eager": r"enforce_eager=(\w+)",
        "cuda_graphs": r"'cudagraph_mode': <CUDAGraphMode\.(\w+)",
        "prefix_caching": r"enable_prefix_caching=(\w+)",
        "chunked_prefill": r"enable_chunked_prefill=(\w+)",
        "device": r"device_config=(\w+)",
        "max_concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    }
    found = {name: re.search(pattern, log) for name, pattern in patterns.items()}
    known = {name: match[1] for name, match in found.items() if match}
    # vLLM 0.32 prints no line when async scheduling is on, which is its default. It warns where it
    # has to switch it off, prints arguments that are not defaults, and its platform for CPUs always
    # switches it off, without a word (vllm/platforms/cpu.py).
    switched_off = r"[Aa]sync scheduling .*(?:will be|is) disabled|'async_scheduling': False"
    if device := known.get("device"):
        is_off = device == "cpu" or re.search(switched_off, log)
        known["async_scheduling"] = "False" if is_off else "True"
    return known


def run_once(
    suite: Suite,
    workload: Workload,
    policy: Policy,
    model: Path,
    load_arguments: list[str],
    timeout: float,
    progress: Progress,
    task: TaskID,
) -> dict[str, Any]:
    """Start a server, warm it up, load it and watch it; never raises for what the server does.

    Returns:
        ``status`` is "ok", "failed" (it crashed, refused or hung) or "wrong" (its output failed
        the check), the latter two with the ``reason`` and without a speed.
    """
    shape = read_model_shape(str(model))[0]
    arguments = [
        *load_arguments,
        *["--max-model-len", str(workload.max_model_len), "--block-size", str(suite.block_size)],
        "--kv-cache-memory-bytes",
        str(kv_memory_bytes(workload.kv_tokens, shape, suite.block_size)),
        *policy.serve_arguments(),
    ]
    result: dict[str, Any] = {"policy": policy.name, "serve_arguments": shlex.join(arguments)}
    requests = draw_requests(workload, SEED)
    requested = [request.output_len for request in requests]
    progress.update(task, total=sum(requested), completed=0, state="starting")
    try:
        with Server(model, arguments) as server:
            server.wait_until("Application startup complete", timeout=600)
            progress.update(task, state="warming up")
            longest = (policy.budget or 0) + 2 * policy.window
            short = warm_up(workload, longest)
            few = draw_requests(short, WARM_UP_SEED)
            run_load(server, few, short.concurrency, model, timeout)
            before = evictions_so_far(server, policy)
            interval = 0.5
            with Monitor(server, interval) as monitor:

                def watch() -> None:
                    state = (
                        f"running {monitor.latest('running'):.0f}, "
                        f"waiting {monitor.latest('waiting'):.0f}, "
                        f"preempted {monitor.latest('preemptions'):.0f}"
                    )
                    progress.update(task, completed=monitor.latest("generated"), state=state)

                load = run_load(
                    server,
                    requests,
                    workload.concurrency,
                    model,
                    timeout,
                    workload.stops,
                    watch,
                )
            after = evictions_so_far(server, policy)
            evictions = None if after is None or before is None else after - before
            left = server.num_used_blocks()
            result["server"] = facts(server.log())
    except (RuntimeError, RunFailedError) as error:
        return result | {"status": "failed", "reason": str(error)[-1500:]}
    wrong = problems(
        load,
        requested,
        workload.stops,
        policy,
        evictions,
        monitor.series,
        left,
        suite.block_size,
        shape.num_query_heads // shape.num_kv_heads,
    )
    result |= {
        "evictions": evictions,
        "preemptions": monitor.series["preemptions"][-1],
        "peak_running": max(monitor.series["running"]),
        "peak_blocks": max(monitor.series["blocks"]),
        "pool_blocks": monitor.series["pool"][-1],
        "peak_rss_mib": max(monitor.series["rss_mib"]),
        "series": thinned(monitor.series, SERIES_POINTS),
    }
    if wrong:
        return result | {"status": "wrong", "reason": "; ".join(wrong)}
    seconds = monitor.cpu_seconds
    return result | {
        "status": "ok",
        "engine_cpu_seconds": round(seconds, 2),
        "tokens_per_engine_cpu_second": round(load["total_output_tokens"] / seconds, 2),
        "time_per_token": time_per_token(load),
        "load": {name: value for name, value in load.items() if name not in DETAILS},
    }


def run_workload(
    name: str, suite: Suite, workload: Workload, args: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of a workload, the policies in turn; every other round in reverse order."""
    chosen = args.policies or workload.policies
    policies = [policy for policy in suite.policies if not chosen or policy.name in chosen]
    rounds = args.rounds or workload.rounds
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    path = args.output / f"{name}-{workload.name}.json"
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    if args.append and path.exists():
        earlier = json.loads(path.read_text())
        runs, notes = earlier["runs"], earlier["notes"]
    notes += args.note
    done = max((run["round"] for run in runs), default=0)
    result = {
        "suite": name,
        "workload": {"name": workload.name, **vars(workload), "rounds": done + rounds},
        "model": suite.model if isinstance(suite.model, dict) else suite.model.name,
        "block_size": suite.block_size,
        **provenance(),
        "environment": suite.environment,
        "notes": notes,
        "runs": runs,
    }
    with (
        tempfile.TemporaryDirectory(prefix="throughput-") as directory,
        environment(suite.environment),
        Progress(*columns, TimeElapsedColumn(), transient=True) as progress,
    ):
        model = Path(directory)
        load_arguments = prepare_model(suite, model)
        all_rounds = progress.add_task(workload.name, total=rounds * len(policies), state="")
        for index in range(done, done + rounds):
            for policy in policies if index % 2 == 0 else reversed(policies):
                task = progress.add_task(f"round {index + 1}, {policy.name}", state="")
                run = run_once(
                    suite, workload, policy, model, load_arguments, args.timeout, progress, task
                )
                runs.append({"round": index + 1, **run})
                progress.remove_task(task)
                progress.advance(all_rounds)
                outcome = run.get("reason", "")
                if run["status"] == "ok":
                    outcome = f"{run['load']['output_throughput']:.1f} output tokens/s"
                progress.console.print(
                    f"{workload.name}, round {index + 1}, {policy.name}: {run['status']} {outcome}",
                    markup=False,
                )
                args.output.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, separators=(",", ":"), default=str) + "\n")
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--workloads", nargs="+", help="some of the suite's only")
    parser.add_argument(
        "--policies", nargs="+", help="of the suite, instead of each workload's own"
    )
    parser.add_argument("--rounds", type=int, help="instead of each workload's own number")
    parser.add_argument(
        "--append", action="store_true", help="add rounds to results that are there"
    )
    parser.add_argument("--note", action="append", default=[], help="to be shown with the results")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report-only", action="store_true", help="from results already there")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    for kind in ("workloads", "policies"):
        known = [item.name for item in getattr(suite, kind)]
        if unknown := set(getattr(args, kind) or ()) - set(known):
            parser.error(f"--{kind}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return args


def main() -> int:
    args = parse_arguments()
    suite = SUITES[args.suite]
    failed = False
    if not args.report_only:
        for workload in suite.workloads:
            if not args.workloads or workload.name in args.workloads:
                result = run_workload(args.suite, suite, workload, args)
                failed |= any(run["status"] != "ok" for run in result["runs"])
    console = Console()
    console.print(report.write(args.output, args.suite), markup=False)
    console.print(f"Raw results, report and plots are in {args.output}", markup=False)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
