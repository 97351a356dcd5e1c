"""One load: ``vllm bench serve`` against a server, by one client or by two at once."""

import json
import multiprocessing.connection
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
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


@dataclass(frozen=True)
class Client:
    """A ``vllm bench serve`` that has been started.

    Attributes:
        directory: where it writes what it prints and its result.
    """

    process: ForkServerProcess
    directory: Path

    @classmethod
    def start(
        cls,
        server: Server,
        requests: list[Request],
        concurrency: int,
        model: Path,
        stops: tuple[int, ...],
        directory: Path,
    ) -> "Client":
        """Start one that sends the requests in their order; all of them or none opt out."""
        dataset = directory / "requests.jsonl"
        write_dataset(requests, dataset)
        arguments = {
            "--model": model,
            "--base-url": server.url,
            "--dataset-name": "custom",
            "--dataset-path": dataset,
            # The length that each request has in the file.
            "--custom-output-len": -1,
            "--num-prompts": len(requests),
            "--max-concurrency": concurrency,
            "--ready-check-timeout-sec": 0,
            "--percentile-metrics": "ttft,tpot,itl",
            "--result-dir": directory,
            "--result-filename": "load.json",
        }
        body: dict[str, Any] = {}
        if requests[0].opts_out:
            body["vllm_xargs"] = {"kv_eviction": "none"}
        if stops:
            body |= {"stop_token_ids": stops, "temperature": 1.0}
        if body:
            arguments["--extra-body"] = json.dumps(body)
        command = ["bench", "serve", *(str(word) for pair in arguments.items() for word in pair)]
        command += ["--disable-shuffle", "--skip-chat-template", "--disable-tqdm"]
        command += ["--save-result", "--save-detailed"]
        if not stops:
            command += ["--ignore-eos"]
        output = directory / "output.log"
        return cls(forked.start("vllm.entrypoints.cli.main", command, output, CLIENT), directory)

    def result(self) -> dict[str, Any]:
        """What it saved, once it has ended."""
        if self.process.exitcode:
            output = (self.directory / "output.log").read_text(errors="replace")
            end = output.partition("nanobind:")[0][-1500:]
            raise RunFailedError(f"vllm bench serve failed: {end}")
        saved: dict[str, Any] = json.loads((self.directory / "load.json").read_text())
        saved.pop("generated_texts", None)
        return saved


def by_client(requests: list[Request]) -> list[list[Request]]:
    """The requests that each client sends, in order: those that opt out are the last one's.

    ``vllm bench serve`` sends every request of a file of prompts with the same settings.
    """
    groups = ([r for r in requests if r.opts_out is opts_out] for opts_out in (False, True))
    return [group for group in groups if group]


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

    Each client has the share of the concurrency that it has of the requests.

    Args:
        stops: see :class:`~benchmarks.common.workload.Workload`.

    Returns:
        What ``vllm bench serve`` saves with ``--save-detailed``, without the texts. Where there are
        two clients, what :func:`merged` keeps of it; requests are in the order of
        :func:`by_client`.

    Raises:
        RunTimeoutError: it was stopped after ``timeout`` seconds.
        RunFailedError: it failed; with the end of what it printed.
    """
    deadline = time.monotonic() + timeout
    clients: list[Client] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            for index, group in enumerate(by_client(requests)):
                own = Path(directory) / str(index)
                own.mkdir()
                share = max(1, round(concurrency * len(group) / len(requests)))
                clients.append(Client.start(server, group, share, model, stops, own))
            while is_running(clients) and time.monotonic() < deadline:
                running = [c.process.sentinel for c in clients if c.process.is_alive()]
                multiprocessing.connection.wait(running, timeout=0.5)
                watch()
        finally:
            timed_out = is_running(clients)
            for client in clients:
                client.process.kill()
                client.process.join()
        if timed_out:
            raise RunTimeoutError(f"not done after {timeout:.0f} s")
        return merged([client.result() for client in clients])


def is_running(clients: list[Client]) -> bool:
    return any(client.process.is_alive() for client in clients)


def merged(loads: list[dict[str, Any]]) -> dict[str, Any]:
    """The loads of clients that ran at once as one, by the formulas of ``vllm bench serve``."""
    if len(loads) == 1:
        return loads[0]
    numbers = ("completed", "failed", "total_input_tokens", "total_output_tokens")
    lists = ("input_lens", "output_lens", "start_times", "latencies", "ttfts", "itls", "errors")
    load: dict[str, Any] = {name: sum(part[name] for part in loads) for name in numbers}
    load |= {name: [value for part in loads for value in part[name]] for name in lists}
    starts, latencies = np.array(load["start_times"]), np.array(load["latencies"])
    # Clocks of processes agree: it is the machine's monotonic clock.
    load["duration"] = float((starts + latencies).max() - starts.min())
    load["output_throughput"] = load["total_output_tokens"] / load["duration"]
    ttfts, lengths = np.array(load["ttfts"]), np.array(load["output_lens"])
    several = lengths > 1
    per_token = ((latencies - ttfts) / np.maximum(lengths - 1, 1))[several]
    load["median_ttft_ms"] = float(np.median(ttfts)) * 1e3
    load["median_tpot_ms"] = float(np.median(per_token)) * 1e3
    load["p99_itl_ms"] = float(np.percentile(np.concatenate(load["itls"]), 99)) * 1e3
    return load


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
