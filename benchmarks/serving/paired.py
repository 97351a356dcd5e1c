"""Eviction against the full cache on two servers at once, which take turns: for small differences.

    python -m benchmarks.serving.paired --workload relaxed [--policy vase-512] [--dtype float32]

A shared machine is faster in one minute than in the next, by more than what eviction may cost where
it has nothing to gain. So both servers run from the start to the end, idle but for their turn; each
pair is the same number of fresh requests to the one and then to the other, and the next pair goes
the other way around. A pair's ratio is of two runs half a minute apart.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy.intervals import interval
from benchmarks.common.figures import pyplot, save
from benchmarks.common.policy import Policy
from benchmarks.common.provenance import provenance
from benchmarks.common.results import ResultsFile
from benchmarks.common.workload import SEED, Workload
from benchmarks.serving.benchmark import START_SECONDS
from benchmarks.serving.measure import Service, prepare_model, service
from benchmarks.serving.run import RESULTS
from benchmarks.serving.suites import SUITES, Suite
from vase_vllm.tools.markdown import table

SUITE = "cpu"
FULL = "full"
TIMEOUT = 600.0


def turn(warm: Service, seed: int) -> float:
    """Output tokens per second of one turn.

    Raises:
        ValueError: the run is not what it must be; the message says why.
    """
    run = warm.measure(warm.workload.concurrency, TIMEOUT, lambda _: None, seed)
    if run["status"] != "ok":
        raise ValueError(f"{warm.policy.name}: {run['reason']}")
    return round(float(run["load"]["output_throughput"]), 2)


def run_pairs(
    suite: Suite, workload: Workload, policies: Sequence[Policy], pairs: int, results: ResultsFile
) -> None:
    """Start both servers and let them take turns; every pair is written at once."""
    with (
        tempfile.TemporaryDirectory(prefix="paired-") as directory,
        patch.dict("os.environ", suite.environment),
        ExitStack() as servers,
    ):
        load_arguments = prepare_model(suite, Path(directory))
        warm = [
            servers.enter_context(
                service(
                    suite,
                    workload,
                    policy,
                    Path(directory),
                    load_arguments,
                    START_SECONDS,
                    TIMEOUT,
                )
            )
            for policy in policies
        ]
        for index in track(range(pairs), description=workload.name, transient=True):
            order = warm if index % 2 == 0 else warm[::-1]
            speeds = {each.policy.name: turn(each, SEED + index) for each in order}
            results.content["pairs"].append(speeds)
            results.write()


def ratios(result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each pair, the policy's speed over the full cache's."""
    return np.array([pair[result["policy"]] / pair[FULL] for pair in result["pairs"]])


def row(result: dict[str, Any]) -> list[str]:
    """A workload's row of the page."""
    found = ratios(result)
    low, high = interval(found)
    quartiles = statistics.quantiles(found, n=4)
    speeds = [
        f"{statistics.median(pair[name] for pair in result['pairs']):.0f}"
        for name in (FULL, result["policy"])
    ]
    return [
        result["workload"]["name"],
        result["policy"],
        result["dtype"],
        str(len(found)),
        *speeds,
        f"{quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})",
        f"{found.mean():.3f} ({low:.3f} to {high:.3f})",
    ]


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The ratio of every pair, a column for each workload."""
    figure, axis = pyplot.subplots(figsize=(2 + 2 * len(results), 4), layout="constrained")
    names = ["\n".join(row(result)[:3]) for result in results]
    for column, result in enumerate(results):
        found = ratios(result)
        spread = np.linspace(-0.2, 0.2, len(found))
        axis.plot(column + spread, found, "o", markersize=4, alpha=0.6)
        axis.hlines(np.median(found), column - 0.3, column + 0.3, colors="#4d4d4d")
    axis.axhline(1.0, linewidth=0.8, linestyle=":", color="#4d4d4d")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("output tokens per second / full cache's")
    save(figure, path, "paired")


def page(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    machine, versions = results[0]["machine"], results[0]["versions"]
    described = [
        f"- {result['workload']['name']}: {result['workload']['question']}; "
        f"{result['workload']['num_requests']} requests a turn, "
        f"{result['workload']['concurrency']} at a time, outputs of "
        f"{result['workload']['output_len']} tokens; {result['date'][:10]}, "
        f"`{result['command']}`"
        for result in results
    ]
    head = ["workload", "policy", "dtype", "pairs", "full cache, tokens/s", "policy, tokens/s"]
    head += ["median ratio (quartiles)", "mean ratio (95 % interval)"]
    return "\n".join(
        [
            "# Two servers that take turns",
            "",
            f"- machine: {machine['processor']}, {machine['cores']} cores, "
            f"{machine['accelerator'] or 'no accelerator'}",
            f"- versions: {', '.join(f'{name} {v}' for name, v in versions.items())}",
            f"- model: {', '.join(f'{k} {v}' for k, v in results[0]['model'].items())}",
            *described,
            "",
            *table(head, [row(result) for result in results]),
            "",
            "Both servers of a workload ran from the start to the end and took turns, each turn",
            "with fresh requests; a ratio is of two turns one after the other. The interval is a",
            "bootstrap over pairs.",
            "",
            "![ratios](paired.svg)",
            "",
        ]
    )


def main() -> int:
    suite = SUITES[SUITE]
    workloads = {workload.name: workload for workload in suite.workloads}
    policies = {policy.name: policy for policy in suite.policies}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=workloads, default="relaxed")
    parser.add_argument("--policy", choices=policies.keys() - {FULL}, default="vase-512")
    parser.add_argument(
        "--dtype",
        default=suite.dtype,
        help="as vllm serve takes it; vLLM loads fp32 weights as bf16 unless it is given",
    )
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--waves", type=int, default=1, help="requests of a turn for each client")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    args = parser.parse_args()
    suite = replace(suite, dtype=args.dtype)
    workload = workloads[args.workload]
    workload = replace(workload, num_requests=args.waves * workload.concurrency)
    header = {"suite": SUITE, "workload": asdict(workload), "policy": args.policy}
    header |= {"model": suite.model, "dtype": args.dtype}
    path = args.output / "paired" / f"{args.workload}-{args.policy}-{args.dtype}.json"
    results = ResultsFile(path, header | provenance(), {"pairs": []}, go_on=False)
    chosen = [policies[FULL], policies[args.policy]]
    run_pairs(suite, workload, chosen, args.pairs, results)
    found = [json.loads(file.read_text()) for file in sorted(path.parent.glob("*.json"))]
    plot(found, path.parent / "paired")
    text = page(found)
    (path.parent / "paired.md").write_text(text)
    Console(soft_wrap=True, markup=False).print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
