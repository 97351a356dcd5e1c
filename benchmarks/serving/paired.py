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
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.progress import Progress
from vllm.platforms import current_platform

from benchmarks.common.policy import Policy
from benchmarks.common.provenance import provenance
from benchmarks.common.results import ResultsFile
from benchmarks.common.workload import SEED, Workload
from benchmarks.serving import paired_report
from benchmarks.serving.benchmark import START_SECONDS
from benchmarks.serving.measure import Service, prepare_model, service
from benchmarks.serving.run import RESULTS, refuse_unknown
from benchmarks.serving.suites import SUITES, Suite
from vase_vllm.tools.termination import sigterm_unwinds

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
    servers: Sequence[Service],
    workload: Workload,
    seed: int,
    results: ResultsFile,
    progress: Progress,
) -> None:
    """All pairs of a workload; every turn is written at once.

    Args:
        seed: of the first pair's requests; the next ones count from there.
    """
    warm = [replace(each, workload=workload) for each in servers]
    task = progress.add_task(workload.name, total=len(warm) * workload.rounds)
    for index in range(workload.rounds):
        pair: dict[str, dict[str, float]] = {}
        results.content["pairs"].append(pair)
        for each in warm if index % 2 == 0 else warm[::-1]:
            pair[each.policy.name] = found = turn(each, seed + index)
            results.write()
            said = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
            progress.console.print(f"{workload.name}, {each.policy.name}: {said}", soft_wrap=True)
            progress.advance(task)


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
    refuse_unknown(parser, "--workloads", args.workloads, suite.workloads)
    refuse_unknown(parser, "--policy", [args.policy, paired_report.FULL], suite.policies)
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
    seed = SEED
    with (
        pair_of_servers(
            suite, workloads[0], [policies[args.policy], policies[paired_report.FULL]]
        ) as servers,
        Progress(transient=True) as progress,
    ):
        for workload in workloads:
            header = {"suite": args.suite, "workload": asdict(workload), "policy": args.policy}
            header |= {"model": suite.model_in_results, "dtype": suite.dtype}
            header |= {"arguments": list(suite.arguments)}
            path = directory / f"{workload.name}-{args.policy}-{suite.dtype}.json"
            results = ResultsFile(path, header | provenance(), {"pairs": []}, go_on=False)
            take_turns(servers, workload, seed, results, progress)
            seed += workload.rounds


def main() -> int:
    args = parse_arguments()
    directory = args.output / "paired"
    if not args.report_only:
        run(args, directory)
    Console(soft_wrap=True, markup=False).print(paired_report.write(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
