"""The real vLLM server under load: full cache against eviction. Needs vLLM, and no model weights.

    python benchmarks/serving/gpu_server.py             on a GPU where vLLM and this project are installed
    python benchmarks/serving/gpu_server.py --smoke     a tiny model on a CPU: every step, no numbers

``vllm serve`` runs with weights made up when it loads (the shape of a Qwen3), CUDA graphs, async
scheduling and prefix caching on, which are vLLM's defaults. ``vllm bench serve`` sends random
prompts with long answers, at a concurrency that doubles until memory is full or throughput no
longer grows (``sweep.py``). A round starts every policy's server once, one after the other; a short
run that evicts comes first and is thrown away.

A run counts only if all its answers are complete, evictions happened as often as they must, blocks
stayed within their bound and were all given back, and the server logged no error. The first that
does not ends the call. Runs that count are kept at once: with ``--minutes`` a call stops in time,
and the same command goes on from there.
Writes JSON, Markdown and a plot to benchmarks/results/gpu/.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.monotonic()
"""Of the call: importing vLLM counts."""
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import requests  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from benchmarks.common.dummy_weights import write_model_files  # noqa: E402
from benchmarks.serving import gpu_server_report as server_report  # noqa: E402
from benchmarks.serving.gpu_server_run import (  # noqa: E402
    SMALLEST_INPUT,
    CheckFailedError,
    cache_block_size,
    check_run,
    measure,
    settings_in_effect,
    warm_up,
)
from benchmarks.serving.sweep import Clock, OutOfTimeError, Range, Results  # noqa: E402
from vase_vllm.layout.query_ring import RingLayout  # noqa: E402
from vase_vllm.layout.schedule import EvictionSchedule  # noqa: E402
from vase_vllm.tools.server import Server  # noqa: E402

MODELS = ROOT / "benchmarks" / "models"
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
# Memory for three answers of full length, so that a sweep on a CPU comes to its end as well.
SMOKE = {
    "budgets": [64],
    "window": 16,
    "rounds": 1,
    "concurrency": 2,
    "max_concurrency": 4,
    "input_len": 24,
    "output_len": 600,
}


def write_model(directory: Path, model: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Write a model's directory; returns its config."""
    special = {"eos_token_id": 257, "bos_token_id": None}
    config = json.loads((MODELS / model / "config.json").read_text()) | changes | special
    write_model_files(directory, config)
    return config


def serve_arguments(options: argparse.Namespace, budget: int | None) -> list[str]:
    """Arguments of ``vllm serve``; ``budget=None`` is the full cache, as vLLM serves it."""
    arguments = ["--load-format", "dummy", "--max-model-len", str(options.max_model_len)]
    arguments += shlex.split(options.serve_arguments)
    if options.smoke:
        arguments += ["--enforce-eager", "--dtype", "float32", "--block-size", "32"]
        arguments += ["--kv-cache-memory-bytes", "4M"]
    if budget is not None:
        arguments += ["--kv-eviction", "vase", "--kv-eviction-config.budget", str(budget)]
        arguments += ["--kv-eviction-config.window", str(options.window)]
    return arguments


def sweep_policy(
    options: argparse.Namespace,
    results: Results,
    clock: Clock,
    model: Path,
    config: dict[str, Any],
    round_number: int,
    budget: int | None,
) -> None:
    """Go on with one policy's sweep on a server of its own, if it has not come to its end.

    Raises:
        CheckFailedError: a run was not what it must be.
        OutOfTimeError: there is no time for another.
    """
    policy = policy_name(budget)
    sweep = Range(options.concurrency, options.max_concurrency)
    if results.next(policy, round_number, sweep, clock) is None:
        return
    schedule = None if budget is None else EvictionSchedule(budget, options.window)
    group_size = config["num_attention_heads"] // config["num_key_value_heads"]
    limit = clock.left()
    with Server(model, serve_arguments(options, budget)) as server:
        try:
            server.wait_until("Application startup complete", timeout=limit or 1800)
        except RuntimeError:
            clock.left(at_least=1)
            raise
        block_size = cache_block_size(server)
        in_effect = settings_in_effect(server, options.smoke)
        state_blocks = RingLayout(options.window, group_size, block_size).num_blocks
        warm_up(server, options, model, budget, clock.left())
        last_seconds = 0.0
        while (concurrency := results.next(policy, round_number, sweep, clock)) is not None:
            # Twice the requests take no less time.
            timeout = clock.left(at_least=last_seconds)
            before = server.eviction_stats()["evictions"] if schedule else 0
            begin = time.monotonic()
            try:
                run = measure(server, options, model, concurrency, concurrency, timeout)
            except OutOfTimeError:
                results.cut(policy, concurrency, clock, time.monotonic() - begin)
                raise
            after = server.eviction_stats()["evictions"] if schedule else 0
            check_run(run, options, schedule, after - before, state_blocks, block_size)
            if error := ERROR.search(server.log()):
                raise CheckFailedError(f"the server logged an error: {error[0]}")
            last_seconds = run["seconds"]
            head = {"policy": policy, "round": round_number, "in_effect": in_effect}
            results.add(head | {"evictions": after - before, "block_size": block_size} | run)
            print(f"  {policy}, concurrency {concurrency}: checks passed", flush=True)


def policy_name(budget: int | None) -> str:
    return "full cache" if budget is None else f"vase, budget {budget}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = sorted(path.name for path in MODELS.iterdir())
    parser.add_argument("--model", choices=models, default="qwen3-8b", help="shape of the model")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096, 6144])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16, help="first of the sweep")
    parser.add_argument("--max-concurrency", type=int, default=1024, help="of the sweep")
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=16384)
    parser.add_argument("--waves", type=int, default=1, help="requests for each concurrent client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="stop in time; call again to go on")
    parser.add_argument("--serve-arguments", default="", help="further ones for vllm serve")
    parser.add_argument("--out", type=Path, help="directory of the results, read as well")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU, no numbers")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    elif not current_platform.is_cuda():
        parser.error("no GPU: --smoke runs all of this on a CPU, without numbers")
    options.max_model_len = int(options.input_len * (2 - SMALLEST_INPUT)) + options.output_len + 64
    return options


def header(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a results file share."""
    return {
        "smoke": options.smoke,
        "device": "smoke run, no GPU" if options.smoke else current_platform.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch", "vase-vllm")},
        "python": platform.python_version(),
        "model": "a tiny model" if options.smoke else options.model,
        "settings": {
            name: getattr(options, name)
            for name in ("window", "input_len", "output_len", "waves", "serve_arguments")
        },
    }


def main() -> int:
    options = parse_options()
    # Stopped from outside, it takes its server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock = Clock(options.minutes, START)
    shared = header(options)
    with tempfile.TemporaryDirectory() as directory:
        default = Path(directory) if options.smoke else ROOT / "benchmarks/results/gpu"
        path = server_report.results_path(options.out or default, shared)
        try:
            results = Results(path, shared)
        except ValueError as error:
            print(f"FAILED: {error}")
            return 1
        model = Path(directory) / "model"
        model.mkdir()
        config = write_model(model, options.model, TINY if options.smoke else {})
        results.content["date"] = datetime.date.today().isoformat()
        results.content["command"] = shlex.join(["python", *sys.argv])
        state = "all runs are there"
        policies: list[int | None] = [None, *options.budgets]
        budget: int | None = None
        try:
            for round_number in range(1, options.rounds + 1):
                print(f"round {round_number} of {options.rounds}", flush=True)
                for budget in policies:
                    sweep_policy(options, results, clock, model, config, round_number, budget)
        except OutOfTimeError as error:
            state = f"out of time at {policy_name(budget)} ({error}): the same command goes on"
        except (CheckFailedError, RuntimeError, requests.RequestException) as error:
            print(f"FAILED: {policy_name(budget)}: {error}")
            return 1
        if results.content["runs"]:
            results.write()
            print(server_report.markdown(results.content))
            server_report.write(results.path, results.content)
        print(state if options.smoke and not options.out else f"{state}; results are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
