"""One run of ``vllm bench serve`` against a server."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import forked
from benchmarks.common.workload import Request, write_dataset
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.server import Server

BINS = 16
CLIENT = ["vllm.entrypoints.cli.benchmark.serve", "vllm.entrypoints.cli.serve"]
"""What a load imports, which takes many times as long as a short load."""


class RunFailedError(Exception):
    """The load did not come to its end."""


class RunTimeoutError(RunFailedError):
    """The load took longer than it was given, and was stopped."""


def run_load(
    server: Server,
    requests: list[Request],
    concurrency: int,
    model: Path,
    timeout: float,
    stops: tuple[int, ...] = (),
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Send the requests, so many at a time; ``watch`` is called about once a second meanwhile.

    Args:
        stops: see :class:`~benchmarks.common.workload.Workload`.

    Returns:
        What ``vllm bench serve`` saves with ``--save-detailed``, without the texts.

    Raises:
        RunTimeoutError: it was stopped after ``timeout`` seconds.
        RunFailedError: it failed; with the end of what it printed.
    """
    arguments = {
        "--model": model,
        "--base-url": server.url,
        "--dataset-name": "custom",
        # The length that each request has in the file.
        "--custom-output-len": -1,
        "--num-prompts": len(requests),
        "--max-concurrency": concurrency,
        "--ready-check-timeout-sec": 0,
        "--percentile-metrics": "ttft,tpot,itl",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    with tempfile.TemporaryDirectory() as directory:
        dataset = Path(directory) / "requests.jsonl"
        write_dataset(requests, dataset)
        command = ["bench", "serve", *words]
        command += ["--dataset-path", str(dataset), "--disable-shuffle", "--skip-chat-template"]
        command += ["--disable-tqdm", "--save-result", "--save-detailed"]
        if stops:
            body = {"stop_token_ids": stops, "temperature": 1.0}
            command += ["--extra-body", json.dumps(body)]
        else:
            command += ["--ignore-eos"]
        command += ["--result-dir", directory, "--result-filename", "load.json"]
        output = Path(directory) / "output.log"
        process = forked.start("vllm.entrypoints.cli.main", command, output, CLIENT)
        deadline = time.monotonic() + timeout
        try:
            while process.is_alive() and time.monotonic() < deadline:
                process.join(0.5)
                watch()
        finally:
            timed_out = process.is_alive()
            if timed_out:
                process.kill()
                process.join()
        if timed_out:
            raise RunTimeoutError(f"not done after {timeout:.0f} s")
        if process.exitcode:
            end = output.read_text(errors="replace").partition("nanobind:")[0][-1500:]
            raise RunFailedError(f"vllm bench serve failed: {end}")
        result: dict[str, Any] = json.loads((Path(directory) / "load.json").read_text())
    result.pop("generated_texts", None)
    return result


def time_per_token(load: dict[str, Any]) -> dict[str, list[float]]:
    """Time per token over the position in the output, in bins, over all requests of a run.

    A streamed chunk may carry more than one token when the client falls behind; chunks then stand
    at their share of the output.

    Returns:
        ``position``: end of each bin; ``mean_ms`` and ``median_ms`` of the chunks in it.
    """
    longest = max(load["output_lens"])
    width = cdiv(longest, BINS)
    positions, milliseconds = [], []
    for length, gaps in zip(load["output_lens"], load["itls"], strict=True):
        if not gaps:
            continue
        tokens_per_chunk = (length - 1) / len(gaps)
        positions.append(np.arange(1, len(gaps) + 1) * tokens_per_chunk)
        milliseconds.append(np.array(gaps) * 1e3 / tokens_per_chunk)
    if not positions:
        return {"position": [], "mean_ms": [], "median_ms": []}
    bins = np.minimum(np.concatenate(positions) // width, BINS - 1).astype(int)
    gaps = np.concatenate(milliseconds)
    groups = [gaps[bins == index] for index in range(BINS)]
    filled = [index for index in range(BINS) if len(groups[index])]
    return {
        "position": [(index + 1) * width for index in filled],
        "mean_ms": [round(float(groups[index].mean()), 3) for index in filled],
        "median_ms": [round(float(np.median(groups[index])), 3) for index in filled],
    }
