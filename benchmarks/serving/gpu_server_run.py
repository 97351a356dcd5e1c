"""One run of the server benchmark: its load, what the server did meanwhile, whether it counts."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from vllm.config import CUDAGraphMode

from benchmarks.common.checks import most_blocks
from benchmarks.common.monitor import Monitor
from benchmarks.serving import gpu_server_report as server_report
from benchmarks.serving.sweep import OutOfTimeError
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.server import Server

SMALLEST_INPUT = 0.5
"""Prompts are this share to 1.5 times as long as asked for, so that evictions spread over steps."""


class CheckFailedError(Exception):
    """A run was not what it must be, so that no number counts."""


def send_load(
    server: Server,
    model: Path,
    *,
    concurrency: int,
    num_prompts: int,
    input_len: int,
    output_len: int,
    spread: float,
    seed: int,
    timeout: float | None,
) -> dict[str, Any]:
    """One run of ``vllm bench serve``; returns its result.

    Args:
        spread: prompts are up to this share shorter or longer than ``input_len`` tokens.
        seed: of the prompts. A server sees each seed once, or its prefix cache would know them.
        timeout: seconds that it may take.

    Raises:
        CheckFailedError: it failed.
        OutOfTimeError: it was stopped after ``timeout``.
    """
    arguments = {
        "--model": model,
        "--base-url": server.url,
        "--dataset-name": "random",
        "--seed": seed,
        "--random-input-len": input_len,
        "--random-output-len": output_len,
        "--random-range-ratio": json.dumps({"input": spread, "output": 0.0}),
        "--num-prompts": num_prompts,
        "--max-concurrency": concurrency,
        "--ready-check-timeout-sec": 0,
        "--percentile-metrics": "ttft,tpot,itl",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *words]
        command += ["--ignore-eos", "--disable-tqdm", "--save-result"]
        command += ["--result-dir", directory, "--result-filename", "load.json"]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise OutOfTimeError(f"stopped after {timeout:.0f} s") from None
        if process.returncode:
            raise CheckFailedError(f"vllm bench serve failed:\n{process.stderr[-3000:]}")
        load: dict[str, Any] = json.loads((Path(directory) / "load.json").read_text())
        return load


def warm_up(
    server: Server,
    options: argparse.Namespace,
    model: Path,
    budget: int | None,
    timeout: float | None,
) -> None:
    """A short run that is thrown away. Prompts that fill the budget evict in a few steps."""
    output_len = 2 * options.window + 2
    send_load(
        server,
        model,
        concurrency=options.concurrency,
        num_prompts=options.concurrency,
        input_len=min(budget or options.input_len, options.max_model_len - output_len),
        output_len=output_len,
        spread=0.0,
        seed=0,
        timeout=timeout,
    )


def measure(
    server: Server,
    options: argparse.Namespace,
    model: Path,
    concurrency: int,
    seed: int,
    timeout: float | None,
) -> dict[str, Any]:
    """A run that counts: what ``vllm bench serve`` says, and what the server did meanwhile."""
    begin = time.monotonic()
    with Monitor(server, 0.05 if options.smoke else 1.0) as monitor:
        load = send_load(
            server,
            model,
            concurrency=concurrency,
            num_prompts=concurrency * options.waves,
            input_len=options.input_len,
            output_len=options.output_len,
            spread=1 - SMALLEST_INPUT,
            seed=seed,
            timeout=timeout,
        )
    seconds = time.monotonic() - begin
    deadline = time.monotonic() + 10
    while (left := server.num_used_blocks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    series = monitor.series
    return {
        "concurrency": concurrency,
        "seconds": round(seconds, 1),
        "load": load,
        "peak_running": int(max(series["running"])),
        "peak_blocks": int(max(series["blocks"])),
        "pool_blocks": int(series["pool"][-1]),
        "blocks_left": int(left),
        "preemptions": series["preemptions"][-1],
    }


def cache_block_size(server: Server) -> int:
    """Tokens of a KV cache block, from vLLM's metrics."""
    return int(server.metrics()["vllm:cache_config_info"].samples[0].labels["block_size"])


def check_run(
    run: dict[str, Any],
    options: argparse.Namespace,
    schedule: EvictionSchedule | None,
    num_evictions: int,
    state_blocks: int,
    block_size: int,
) -> None:
    """Refuse a run that is not what it must be.

    Raises:
        CheckFailedError: says what is wrong.
    """
    concurrency, load = run["concurrency"], run["load"]
    num_requests = concurrency * options.waves
    if load["completed"] != num_requests:
        raise CheckFailedError(f"{load['completed']} of {num_requests} requests completed")
    if load["total_output_tokens"] != num_requests * options.output_len:
        raise CheckFailedError(f"{load['total_output_tokens']} output tokens: answers are cut off")
    if not run["peak_blocks"]:
        raise CheckFailedError("no block was seen in use: raise --output-len")
    if run["blocks_left"]:
        raise CheckFailedError(f"{run['blocks_left']} blocks are in use after all requests")
    if schedule is None:
        return
    # At least as many as if the shortest sequence began to evict as late as the longest prompt's.
    shortest = int(options.input_len * SMALLEST_INPUT) + options.output_len
    longest = int(options.input_len * (2 - SMALLEST_INPUT))
    needed = num_requests * schedule.evictions(longest, shortest - longest)[0]
    if not 0 < needed <= num_evictions:
        raise CheckFailedError(f"{num_evictions} evictions, at least {max(needed, 1)} are needed")
    most = concurrency * most_blocks(schedule, state_blocks, longest, block_size)
    if run["peak_blocks"] > most:
        raise CheckFailedError(f"{run['peak_blocks']} blocks in use, {most} are the bound")


def settings_in_effect(server: Server, smoke: bool) -> dict[str, str]:
    """What vLLM made of its defaults.

    Raises:
        CheckFailedError: CUDA graphs or async scheduling are off.
    """
    url = server.url + "/server_info?config_format=json"
    config = requests.get(url, timeout=60).json()["vllm_config"]
    eager = config["model_config"]["enforce_eager"]
    scheduler = config["scheduler_config"]
    is_async = scheduler["async_scheduling"]
    graphs = config["compilation_config"]["cudagraph_mode"]
    # JSON has the value of the enum's member: a number, or a list of two.
    mode = CUDAGraphMode(tuple(graphs) if isinstance(graphs, list) else graphs)
    if not smoke and (eager or mode == CUDAGraphMode.NONE or not is_async):
        raise CheckFailedError(f"graphs are {mode.name}, async_scheduling is {is_async}")
    states = {
        "async scheduling": is_async,
        "chunked prefill": scheduler["enable_chunked_prefill"],
        "prefix caching": config["cache_config"]["enable_prefix_caching"],
    }
    in_effect = {name: "on" if state else "off" for name, state in states.items()}
    backend = server_report.find(server.log(), r"Using (\w+) attention backend")
    return {"attention backend": backend or "not logged", "CUDA graphs": mode.name, **in_effect}
