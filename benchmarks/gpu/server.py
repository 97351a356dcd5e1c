"""The real vLLM server under load: full cache against eviction. Needs vLLM, and no model weights.

    python benchmarks/gpu/server.py             on a GPU where vLLM and this project are installed
    python benchmarks/gpu/server.py --smoke     a tiny model on a CPU: every step, no numbers

``vllm serve`` runs with weights made up when it loads (the shape of Qwen3-8B), CUDA graphs and
async scheduling on, which are vLLM's defaults. ``vllm bench serve`` sends random prompts with long
answers at several concurrencies. A round starts every policy's server once, one after the other;
the first run on each server is thrown away; the numbers are medians over the rounds.

Nothing is reported unless, in every run, all answers are complete, evictions happened as often as
they must, blocks stayed within their bound and were all given back, no evicting server preempted
more often than it had requests, and no server logged an error. The first failure ends it all.
Writes JSON, Markdown and a plot to benchmarks/results/gpu/.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import requests  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.math_utils import cdiv  # noqa: E402

from benchmarks.gpu import server_report  # noqa: E402
from vase_vllm.ring import RingLayout  # noqa: E402
from vase_vllm.schedule import EvictionSchedule  # noqa: E402
from vase_vllm.server import Server  # noqa: E402
from vase_vllm.tiny_model import byte_tokenizer  # noqa: E402

MODEL = ROOT / "benchmarks/models/qwen3-8b/config.json"
SMALLEST_INPUT = 0.5
"""Prompts are this share to 1.5 times as long as asked for, so that evictions spread over steps."""
ERROR = re.compile(r"^.*(?:\bERROR\b|\bCRITICAL\b|Traceback \(most recent|CUDA error).*$", re.M)
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


class CheckFailedError(Exception):
    """A run was not what it must be, so that no number counts."""


def write_model(directory: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Write the config, and a tokenizer of bytes whose every further id is a word of its own.

    Weights that are made up sample any id of the vocabulary, and the server has to print it.
    """
    special = {"eos_token_id": 257, "bos_token_id": None}
    config = json.loads(MODEL.read_text()) | changes | special
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    byte_tokenizer(config["max_position_embeddings"]).save_pretrained(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    known = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    tokenizer["model"]["vocab"] |= {f"w{id};": id for id in range(known, config["vocab_size"])}
    path.write_text(json.dumps(tokenizer))
    return config


def serve_arguments(options: argparse.Namespace, budget: int | None) -> list[str]:
    """Arguments of ``vllm serve``; ``budget=None`` is the full cache, without prefix caching."""
    arguments = ["--load-format", "dummy", "--max-model-len", str(options.max_model_len)]
    # Random prompts share no prefix, and eviction turns prefix caching off as well.
    arguments += ["--no-enable-prefix-caching", *shlex.split(options.serve_arguments)]
    if options.smoke:
        arguments += ["--enforce-eager", "--dtype", "float32", "--block-size", "32"]
        arguments += ["--kv-cache-memory-bytes", "16M"]
    if budget is not None:
        arguments += ["--kv-eviction", "vase", "--kv-eviction-config.budget", str(budget)]
        arguments += ["--kv-eviction-config.window", str(options.window)]
    return arguments


def load_arguments(options: argparse.Namespace, model: Path, concurrency: int) -> list[str]:
    """Arguments of ``vllm bench serve``."""
    lengths = {"input": 1 - SMALLEST_INPUT, "output": 0.0}
    arguments = {
        "--model": model,
        "--dataset-name": "random",
        "--random-input-len": options.input_len,
        "--random-output-len": options.output_len,
        "--random-range-ratio": json.dumps(lengths),
        "--num-prompts": concurrency * options.waves,
        "--max-concurrency": concurrency,
        "--ready-check-timeout-sec": 0,
        "--percentile-metrics": "ttft,tpot,itl",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    return [*words, "--ignore-eos", "--disable-tqdm"]


def metrics(server: Server) -> dict[str, Any]:
    """vLLM's metrics by name, each its first sample."""
    text = requests.get(server.url + "/metrics", timeout=30).text
    families = text_string_to_metric_families(text)
    return {family.name: family.samples[0] for family in families if family.samples}


@contextmanager
def watched_blocks(server: Server, interval: float) -> Iterator[list[int]]:
    """Sample the number of used blocks while the body runs; the last entry is after it."""
    samples: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            samples.append(server.num_used_blocks())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()
    deadline = time.monotonic() + 10
    while (left := server.num_used_blocks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    samples.append(left)


def run_load(
    server: Server, options: argparse.Namespace, model: Path, concurrency: int
) -> dict[str, Any]:
    """One run of ``vllm bench serve``: its own result, and what the server did meanwhile."""
    before = metrics(server)["vllm:num_preemptions"].value
    interval = 0.05 if options.smoke else 1.0
    with tempfile.TemporaryDirectory() as directory, watched_blocks(server, interval) as used:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        command += [*load_arguments(options, model, concurrency), "--base-url", server.url]
        command += ["--save-result", "--result-dir", directory, "--result-filename", "load.json"]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise CheckFailedError(f"vllm bench serve failed:\n{process.stderr[-3000:]}")
        load = json.loads((Path(directory) / "load.json").read_text())
    return {
        "concurrency": concurrency,
        "load": load,
        "peak_blocks": max(used),
        "blocks_left": used[-1],
        "preemptions": metrics(server)["vllm:num_preemptions"].value - before,
    }


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
    # The last token is sampled and never stored.
    last = int(options.input_len * SMALLEST_INPUT) + options.output_len - 2
    first = schedule.first_eviction(int(options.input_len * (2 - SMALLEST_INPUT)))
    needed = num_requests * max(0, (last - first) // schedule.window + 1)
    if not 0 < needed <= num_evictions:
        raise CheckFailedError(f"{num_evictions} evictions, at least {max(needed, 1)} are needed")
    most = concurrency * (state_blocks + cdiv(max(schedule.bound, first), block_size))
    if run["peak_blocks"] > most:
        raise CheckFailedError(f"{run['peak_blocks']} blocks in use, {most} are the bound")
    if run["preemptions"] > num_requests:
        raise CheckFailedError(
            f"{run['preemptions']:.0f} preemptions of {num_requests} requests: lower --concurrency"
        )


def settings_in_effect(server: Server, smoke: bool) -> dict[str, str]:
    """What vLLM made of its defaults.

    Raises:
        CheckFailedError: CUDA graphs or async scheduling are off.
    """
    url = server.url + "/server_info?config_format=json"
    config = requests.get(url, timeout=60).json()["vllm_config"]
    eager = config["model_config"]["enforce_eager"]
    is_async = config["scheduler_config"]["async_scheduling"]
    graphs = config["compilation_config"]["cudagraph_mode"]
    # JSON has the value of the enum's member: a number, or a list of two.
    mode = CUDAGraphMode(tuple(graphs) if isinstance(graphs, list) else graphs)
    if not smoke and (eager or mode == CUDAGraphMode.NONE or not is_async):
        raise CheckFailedError(f"graphs are {mode.name}, async_scheduling is {is_async}")
    return {"CUDA graph mode": mode.name, "async scheduling": "on" if is_async else "off"}


def run_policy(
    options: argparse.Namespace, model: Path, config: dict[str, Any], budget: int | None
) -> dict[str, Any]:
    """Start one server, throw one run away, and measure the others."""
    schedule = None if budget is None else EvictionSchedule(budget, options.window)
    group_size = config["num_attention_heads"] // config["num_key_value_heads"]
    with Server(model, serve_arguments(options, budget)) as server:
        server.wait_until("Application startup complete", timeout=1800)
        cache = metrics(server)["vllm:cache_config_info"].labels
        in_effect = settings_in_effect(server, options.smoke)
        block_size = int(cache["block_size"])
        ring = RingLayout(options.window, group_size, block_size)
        runs = []
        for concurrency in (options.concurrency[0], *options.concurrency):
            before = server.eviction_stats()["evictions"] if schedule else 0
            run = run_load(server, options, model, concurrency)
            after = server.eviction_stats()["evictions"] if schedule else 0
            run["evictions"] = after - before
            check_run(run, options, schedule, after - before, ring.num_blocks, block_size)
            runs.append(run)
            print(f"  {policy_name(budget)}, concurrency {concurrency}: checks passed", flush=True)
        log = server.log()
    if error := ERROR.search(log):
        raise CheckFailedError(f"the server logged an error: {error[0]}")
    return {
        "policy": policy_name(budget),
        "num_blocks": int(cache["num_gpu_blocks"]),
        "block_size": block_size,
        "max_concurrency": server_report.find(log, r"Maximum concurrency for .*: ([\d.]+x)"),
        "attention backend": server_report.find(log, r"Using (\w+) attention backend"),
        **in_effect,
        "runs": runs[1:],
    }


def policy_name(budget: int | None) -> str:
    return "full cache" if budget is None else f"vase, budget {budget}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096, 6144])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=8192)
    parser.add_argument("--waves", type=int, default=1, help="requests for each concurrent client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-arguments", default="", help="further ones for vllm serve")
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU, no numbers")
    options = parser.parse_args()
    if options.smoke:
        options.budgets, options.window, options.rounds = [64], 16, 1
        options.concurrency, options.input_len, options.output_len = [2, 4], 24, 600
    elif not current_platform.is_cuda():
        parser.error("no GPU: --smoke runs all of this on a CPU, without numbers")
    options.max_model_len = int(options.input_len * (2 - SMALLEST_INPUT)) + options.output_len + 64
    return options


def main() -> int:
    options = parse_options()
    # Stopped from outside, it takes its server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    policies: list[int | None] = [None, *options.budgets]
    servers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        config = write_model(Path(directory), TINY if options.smoke else {})
        try:
            for round_number in range(options.rounds):
                print(f"round {round_number + 1} of {options.rounds}", flush=True)
                for budget in policies:
                    servers.append(run_policy(options, Path(directory), config, budget))
        except (CheckFailedError, RuntimeError) as error:
            print(f"FAILED, no numbers: {policy_name(budget)}: {error}")
            return 1
    report = {
        "smoke": options.smoke,
        "device": "smoke run, no GPU" if options.smoke else current_platform.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("vllm", "torch", "vase-vllm")},
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.argv]),
        "model": "a tiny model" if options.smoke else "Qwen3-8B's shape, made-up weights, bf16",
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "smoke")},
        "servers": servers,
    }
    print(server_report.markdown(report))
    out = options.out or (None if options.smoke else ROOT / "benchmarks/results/gpu")
    if out:
        print(f"written to {server_report.write(out, report)} .json, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
