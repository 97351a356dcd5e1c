"""vLLM's offline benchmarks, full cache against eviction, without a server.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.offline [--rounds N]

``vllm bench throughput`` gets all requests at once, in KV memory for about four of full length;
``vllm bench latency`` runs one batch from its first token to its last, memory in plenty. It
switches prefix caching off for everybody. The policies take turns; every other round goes in
reverse order.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.progress import track

from benchmarks.common.dummy_weights import write_dummy_model
from benchmarks.common.paths import MODELS
from benchmarks.common.policy import Policy
from benchmarks.common.provenance import provenance
from benchmarks.serving.measure import kv_memory_bytes
from benchmarks.serving.run import RESULTS
from benchmarks.serving.suites import CPU_MODEL, SUITES
from vase_vllm.tools.markdown import table
from vase_vllm.tools.plan.cost import Shard
from vase_vllm.tools.plan.model_shape import read_model_shape

SUITE = SUITES["cpu"]
POLICIES = tuple(policy for policy in SUITE.policies if policy.name in ("full", "vase-256"))
INPUT_LEN, OUTPUT_LEN = 32, 1536
ITERATIONS = 3
# ``vllm bench latency`` draws token ids below 10000.
VOCAB_SIZE = 10240


@dataclass(frozen=True)
class Tool:
    """One of vLLM's commands.

    Attributes:
        name: ``vllm bench NAME``.
        num_requests: that it runs in one go.
        kv_requests: requests of full length whose KV cache fits into memory.
        arguments: further ones.
        seconds: of its result, the time of each go.
        problem: of its result and its output, what is wrong with it, or nothing.
    """

    name: str
    num_requests: int
    kv_requests: int
    arguments: tuple[str, ...]
    seconds: Callable[[dict[str, Any]], list[float]]
    problem: Callable[[dict[str, Any], str], str]


def tokens_missing(result: dict[str, Any], output: str) -> str:
    """Whether ``vllm bench throughput`` counted all tokens in what the engine returned.

    Its result has only their sum with the prompts', which may differ by a token from what was asked
    for: they are decoded and encoded again.
    """
    expected = result["num_requests"] * OUTPUT_LEN
    found = re.search(r"Total num output tokens:\s+(\d+)", output)
    if found and int(found[1]) == expected:
        return ""
    return f"{found[1] if found else 'no'} output tokens, {expected} asked for"


def iterations_missing(result: dict[str, Any], output: str) -> str:
    """Whether ``vllm bench latency`` ran as often as it was told."""
    found = len(result["latencies"])
    return "" if found == ITERATIONS else f"{found} iterations, {ITERATIONS} asked for"


TOOLS = (
    Tool(
        "throughput",
        num_requests=16,
        kv_requests=4,
        arguments=(
            *("--dataset-name", "random", "--random-range-ratio", "0.0"),
            *("--num-prompts", "16", "--random-input-len", str(INPUT_LEN)),
            *("--random-output-len", str(OUTPUT_LEN), "--num-warmups", "1"),
        ),
        seconds=lambda result: [result["elapsed_time"]],
        problem=tokens_missing,
    ),
    Tool(
        "latency",
        num_requests=4,
        kv_requests=8,
        arguments=(
            *("--batch-size", "4", "--input-len", str(INPUT_LEN), "--output-len", str(OUTPUT_LEN)),
            *("--num-iters-warmup", "1", "--num-iters", str(ITERATIONS)),
        ),
        seconds=lambda result: result["latencies"],
        problem=iterations_missing,
    ),
)


def write_model(directory: Path) -> None:
    """The suite's model with a larger vocabulary, to be loaded with dummy weights."""
    changes = {
        "num_hidden_layers": CPU_MODEL["layers"],
        "hidden_size": CPU_MODEL["hidden_size"],
        "intermediate_size": CPU_MODEL["intermediate_size"],
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
    }
    write_dummy_model(directory, MODELS / "qwen3-8b", changes)


def run_tool(tool: Tool, policy: Policy, model: Path) -> dict[str, Any]:
    """Run one command; ``status`` is "ok", "failed" or "wrong", the latter two without a speed."""
    shard = Shard(read_model_shape(str(model))[0])
    kv_tokens = tool.kv_requests * (INPUT_LEN + OUTPUT_LEN)
    kv_bytes = kv_memory_bytes(kv_tokens, shard, SUITE.block_size)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", tool.name]
    command += ["--model", str(model), "--load-format", "dummy", "--disable-detokenize"]
    command += ["--max-model-len", str(INPUT_LEN + OUTPUT_LEN + 32)]
    command += ["--block-size", str(SUITE.block_size)]
    command += ["--kv-cache-memory-bytes", str(kv_bytes)]
    command += [*tool.arguments, *policy.serve_arguments()]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        process = subprocess.run(
            [*command, "--output-json", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            return {"status": "failed", "reason": process.stdout[-1500:]}
        result = json.loads(path.read_text())
    evicts = re.search(r"KV eviction: \w+, at most", process.stdout) is not None
    if evicts != (policy.budget is not None):
        return {"status": "wrong", "reason": "eviction is " + ("on" if evicts else "off")}
    if reason := tool.problem(result, process.stdout):
        return {"status": "wrong", "reason": reason}
    seconds = statistics.median(tool.seconds(result))
    speed = tool.num_requests * OUTPUT_LEN / seconds
    return {"status": "ok", "output_tokens_per_second": round(speed, 2), "result": result}


def markdown(result: dict[str, Any]) -> str:
    """The tables of both tools."""
    lines = [
        "# vLLM's offline benchmarks: full cache against eviction",
        "",
        f"{result['date'][:10]}, {result['machine']['processor']}, "
        f"vLLM {result['versions']['vllm']}, `{result['command']}`. Model: {result['model']}. "
        f"Prompts of {INPUT_LEN} tokens, outputs of {OUTPUT_LEN}, every one complete. Medians over "
        "the rounds, their range in brackets; the ratio is that of the medians.",
        *(f"\n{note}" for note in result["notes"]),
    ]
    for tool in TOOLS:
        lines += [
            "",
            f"## vllm bench {tool.name}",
            "",
            f"{tool.num_requests} requests, KV memory for {tool.kv_requests} of full length.",
            "",
        ]
        rows, full = [], None
        for policy in POLICIES:
            runs = [
                run
                for run in result["runs"]
                if (run["tool"], run["policy"]) == (tool.name, policy.name)
            ]
            if any(run["status"] != "ok" for run in runs) or not runs:
                reasons = {run["reason"][-200:] for run in runs if run["status"] != "ok"}
                rows.append([policy.name, "; ".join(reasons) or "not run", "", ""])
                continue
            speeds = [run["output_tokens_per_second"] for run in runs]
            median = statistics.median(speeds)
            full = median if policy.budget is None else full
            of_full = f"{median / full:.2f}" if full else ""
            speed = f"{median:.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
            rows.append([policy.name, speed, of_full, str(len(runs))])
        lines += table(["policy", "output tokens/s", "of the full cache", "rounds"], rows)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", action="append", default=[], help="to be shown with the results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = {
        **provenance(),
        "model": "two layers of Qwen3-8B's attention, few weights around them, dummy weights",
        "environment": SUITE.environment,
        "notes": args.note,
        "runs": [],
    }
    plan = [
        (index, tool, policy)
        for index in range(args.rounds)
        for tool in TOOLS
        for policy in (POLICIES if index % 2 == 0 else POLICIES[::-1])
    ]
    path = args.output / "offline-cpu.json"
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, patch.dict("os.environ", SUITE.environment):
        write_model(Path(directory))
        for index, tool, policy in track(plan, "vllm bench", transient=True):
            run = run_tool(tool, policy, Path(directory))
            result["runs"].append(
                {"round": index + 1, "tool": tool.name, "policy": policy.name, **run}
            )
            path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    Console().print(markdown(result), markup=False)
    return int(any(run["status"] != "ok" for run in result["runs"]))


if __name__ == "__main__":
    sys.exit(main())
