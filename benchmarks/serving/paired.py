"""Eviction against the full cache on two servers at once, which take turns: for small differences.

    python -m benchmarks.serving.paired --workloads relaxed [--policy vase-512] [--dtype float32]
    python -m benchmarks.serving.paired --suite pair-qwen3-8b --policy vase-1024      on a GPU

A shared machine is faster in one minute than in the next, by more than what eviction may cost where
it has nothing to gain. So both servers run from the start to the end, idle but for their turn; each
pair is the same number of fresh requests to the one and then to the other, and the next pair goes
the other way around. A pair's ratio is of two runs half a minute apart. Several workloads run one
after the other on the same two servers, which start at once: a start takes minutes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.progress import Progress
from vllm.platforms import current_platform

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
from vase_vllm.tools.termination import sigterm_unwinds

FULL = "full"
TIMEOUT = 600.0


def turn(warm: Service, seed: int) -> dict[str, float]:
    """What one turn took.

    Returns:
        ``tokens_per_second`` of output, ``median_itl_ms`` between two tokens, ``preemptions`` and
        ``peak_running`` requests.

    Raises:
        ValueError: the run is not what it must be; the message says why.
    """
    run = warm.measure(warm.workload.concurrency, TIMEOUT, lambda _: None, seed)
    if run["status"] != "ok":
        raise ValueError(f"{warm.policy.name}: {run['reason']}")
    return {
        "tokens_per_second": round(run["load"]["output_throughput"], 2),
        "median_itl_ms": round(run["load"]["median_itl_ms"], 3),
        "preemptions": run["preemptions"],
        "peak_running": run["peak_running"],
    }


@contextmanager
def pair_of_servers(
    suite: Suite, workload: Workload, policies: Sequence[Policy]
) -> Iterator[list[Service]]:
    """The policies' servers, which start at once.

    Raises:
        RuntimeError: one does not start.
    """
    with (
        tempfile.TemporaryDirectory(prefix="paired-") as directory,
        patch.dict("os.environ", suite.environment),
        # A server that a thread starts leaves SIGTERM to the main thread.
        sigterm_unwinds(),
        ExitStack() as servers,
    ):
        load_arguments = prepare_model(suite, Path(directory))

        def start(policy: Policy) -> Service:
            shared = (suite, workload, policy, Path(directory), load_arguments)
            return servers.enter_context(service(*shared, START_SECONDS, TIMEOUT))

        with ThreadPoolExecutor(len(policies)) as pool:
            warm = list(pool.map(start, policies))
        yield warm


def take_turns(
    servers: Sequence[Service], workload: Workload, seed: int, results: ResultsFile, progress: Any
) -> None:
    """All pairs of a workload; every pair is written at once.

    Args:
        seed: of the first pair's requests; the next ones count from there.
    """
    warm = [replace(each, workload=workload) for each in servers]
    for index in range(workload.rounds):
        order = warm if index % 2 == 0 else warm[::-1]
        pair = {}
        for each in order:
            pair[each.policy.name] = found = turn(each, seed + index)
            said = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            progress.console.print(f"{workload.name}, {each.policy.name}: {said}")
        results.content["pairs"].append(pair)
        results.write()


def ratios(result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each pair, the policy's speed over the full cache's."""
    policy = of_turns(result, result["policy"], "tokens_per_second")
    return policy / of_turns(result, FULL, "tokens_per_second")


def of_turns(result: dict[str, Any], name: str, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One number of all turns of a server, in the order of the pairs."""
    return np.array([pair[name][key] for pair in result["pairs"]])


def row(result: dict[str, Any]) -> list[str]:
    """A workload's row of the page."""
    found = ratios(result)
    median, mean = f"{np.median(found):.3f}", "one pair"
    if len(found) > 1:
        first, third = np.quantile(found, (0.25, 0.75))
        median += f" ({first:.3f} to {third:.3f})"
        low, high = interval(found)
        mean = f"{found.mean():.3f} ({low:.3f} to {high:.3f})"
    names = FULL, result["policy"]
    speeds = [f"{np.median(of_turns(result, n, 'tokens_per_second')):,.0f}" for n in names]
    latencies = [f"{np.median(of_turns(result, n, 'median_itl_ms')):.1f}" for n in names]
    preempted = [f"{np.median(of_turns(result, n, 'preemptions')):.0f}" for n in names]
    return [
        result["workload"]["name"],
        result["policy"],
        result["dtype"],
        str(len(found)),
        *speeds,
        ", ".join(latencies),
        ", ".join(preempted),
        median,
        mean,
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
    machine, versions, model = (results[0][key] for key in ("machine", "versions", "model"))
    if not isinstance(model, str):
        model = ", ".join(f"{name} {value}" for name, value in model.items())
    described = [
        f"- {result['workload']['name']}: {result['workload']['question']}; "
        f"{result['workload']['num_requests']} requests a turn, "
        f"{result['workload']['concurrency']} at a time, outputs of "
        f"{result['workload']['output_len']} tokens; {result['date'][:10]}, "
        f"`{result['command']}`"
        for result in results
    ]
    head = ["workload", "policy", "dtype", "pairs", "full cache, tokens/s", "policy, tokens/s"]
    head += [
        "ms between tokens, both",
        "preempted, both",
        "median ratio (quartiles)",
        "mean ratio (95 % interval)",
    ]
    return "\n".join(
        [
            "# Two servers that take turns",
            "",
            f"- machine: {machine['processor']}, {machine['cores']} cores, "
            f"{machine['accelerator'] or 'no accelerator'}",
            f"- versions: {', '.join(f'{name} {v}' for name, v in versions.items())}",
            f"- model: {model}",
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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    pairs = {name: suite for name, suite in SUITES.items() if not suite.workloads[0].is_sweep}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=pairs, default="cpu")
    parser.add_argument("--workloads", nargs="+", help="that share the two servers; default: all")
    parser.add_argument("--policy", default="vase-512", help="of the suite")
    parser.add_argument(
        "--dtype",
        help="as vllm serve takes it; vLLM loads fp32 weights as bf16 unless it is given",
    )
    parser.add_argument("--pairs", type=int, help="of a workload; default: its number of rounds")
    parser.add_argument("--waves", type=int, default=1, help="requests of a turn for each client")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--report-only", action="store_true", help="from results already there")
    args = parser.parse_args(arguments)
    if args.report_only:
        return args
    suite = SUITES[args.suite]
    if suite.needs_gpu and not current_platform.is_cuda():
        parser.error(f"no GPU: suite {args.suite} is for one")
    args.workloads = args.workloads or [workload.name for workload in suite.workloads]
    for kind, asked in (("workloads", args.workloads), ("policies", [args.policy, FULL])):
        known = [item.name for item in getattr(suite, kind)]
        if unknown := set(asked) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: suite {args.suite} has {', '.join(known)}")
    if len({(each.kv_tokens, each.max_model_len) for each in chosen_workloads(args)}) > 1:
        parser.error("--workloads: these differ in KV memory or longest sequence: name one of them")
    return args


def chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    """The workloads with what the command line changes of them."""
    found = [each for each in SUITES[args.suite].workloads if each.name in args.workloads]
    if args.pairs:
        found = [replace(each, rounds=args.pairs) for each in found]
    return [replace(each, num_requests=args.waves * each.concurrency) for each in found]


def run(args: argparse.Namespace, directory: Path) -> None:
    """Start the two servers and run all workloads on them."""
    suite = SUITES[args.suite]
    suite = replace(suite, dtype=args.dtype or suite.dtype)
    workloads = chosen_workloads(args)
    policies = {policy.name: policy for policy in suite.policies}
    model = suite.model.name if isinstance(suite.model, Path) else suite.model
    seed = SEED
    with (
        pair_of_servers(suite, workloads[0], [policies[args.policy], policies[FULL]]) as servers,
        Progress(transient=True) as progress,
    ):
        for workload in workloads:
            header = {"suite": args.suite, "workload": asdict(workload), "policy": args.policy}
            header |= {"model": model, "dtype": suite.dtype, "arguments": list(suite.arguments)}
            path = directory / f"{workload.name}-{args.policy}-{suite.dtype}.json"
            results = ResultsFile(path, header | provenance(), {"pairs": []}, go_on=False)
            take_turns(servers, workload, seed, results, progress)
            seed += workload.rounds


def main() -> int:
    args = parse_arguments()
    directory = args.output / "paired"
    if not args.report_only:
        run(args, directory)
    found = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    plot(found, directory / "paired")
    text = page(found)
    (directory / "paired.md").write_text(text)
    Console(soft_wrap=True, markup=False).print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
