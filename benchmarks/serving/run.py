"""Throughput, memory and capacity of eviction against the full cache, on real servers.

    python -m benchmarks.serving.run [--suite cpu] [--workloads NAME ...] [--rounds N]
    python -m benchmarks.serving.run --suite sweep-qwen3-8b --minutes 9
    python -m benchmarks.serving.run --suite sweep-qwen3-8b-small --minutes 8
    python -m benchmarks.serving.run --suite smoke

See README.md in this folder for what is measured and how to read it.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
from rich.console import Console
from vllm.platforms import current_platform

from benchmarks.common import paths
from benchmarks.common.clock import Clock, OutOfTimeError
from benchmarks.common.exit_codes import OUT_OF_TIME
from benchmarks.common.policy import Policy
from benchmarks.common.workload import Workload
from benchmarks.serving import report
from benchmarks.serving.benchmark import Benchmark, CheckFailedError
from benchmarks.serving.suites import SUITES, Suite, budget_policies, sweep

RESULTS = paths.RESULTS / "serving"
SWEEP_OPTIONS = ("concurrency", "max_concurrency", "input_len", "output_len", "waves")
SWEEP_KEEPS = ("kv_tokens", "rounds")
"""What no option of a sweep changes of its workload."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--workloads", nargs="+", help="some of the suite's only")
    parser.add_argument(
        "--policies", nargs="+", help="of the suite, instead of each workload's own"
    )
    parser.add_argument("--budgets", type=int, nargs="+", help="of vase, instead of policies")
    parser.add_argument("--window", type=int, help="of --budgets")
    parser.add_argument("--rounds", type=int, help="instead of each workload's own number")
    parser.add_argument(
        "--append", action="store_true", help="add rounds to results that are there"
    )
    parser.add_argument("--note", action="append", default=[], help="to be shown with the results")
    parser.add_argument("--serve-arguments", default="", help="further ones for vllm serve")
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds for one run")
    parser.add_argument("--output", type=Path, help="directory of the results, read as well")
    parser.add_argument("--report-only", action="store_true", help="from results already there")
    sweeps = parser.add_argument_group("suites that sweep over the concurrency")
    sweeps.add_argument("--minutes", type=float, help="stop in time; call again to go on")
    sweeps.add_argument("--concurrency", type=int, help="first of the sweep")
    sweeps.add_argument("--max-concurrency", type=int, help="of the sweep")
    sweeps.add_argument("--input-len", type=int, help="mean length of the prompts")
    sweeps.add_argument("--output-len", type=int, help="of every output")
    sweeps.add_argument("--waves", type=int, help="requests for each concurrent client")
    args = parser.parse_args(arguments)
    suite = SUITES[args.suite]
    refuse_unknown(parser, "--workloads", args.workloads or (), suite.workloads)
    refuse_unknown(parser, "--policies", args.policies or (), suite.policies)
    sweeps_only = all(workload.is_sweep for workload in suite.workloads)
    if args.minutes is not None and not sweeps_only:
        parser.error("--minutes is for the suites that sweep over the concurrency")
    given = [name for name in SWEEP_OPTIONS if getattr(args, name) is not None]
    if given and (suite.smoke or not sweeps_only):
        parser.error(f"--{given[0].replace('_', '-')} is for the suites sweep-*")
    if args.budgets and args.policies:
        parser.error("give --budgets or --policies")
    if args.window and not args.budgets:
        parser.error("--window is of --budgets")
    if suite.needs_gpu and not args.report_only and not current_platform.is_cuda():
        parser.error("no GPU: --suite smoke goes through every step on a CPU, without numbers")
    return args


def refuse_unknown(
    parser: argparse.ArgumentParser,
    option: str,
    names: Sequence[str],
    known: Sequence[Workload | Policy],
) -> None:
    """End the program if an option names what the suite does not have."""
    if unknown := set(names) - {item.name for item in known}:
        choice = ", ".join(item.name for item in known)
        parser.error(f"{option}: {', '.join(sorted(unknown))} is none of {choice}")


def chosen_suite(args: argparse.Namespace) -> Suite:
    """The suite with what the command line changes of it."""
    suite = SUITES[args.suite]
    suite = replace(suite, arguments=(*suite.arguments, *shlex.split(args.serve_arguments)))
    if args.budgets:
        policies = budget_policies(*args.budgets, window=args.window)
        workloads = tuple(replace(workload, policies=()) for workload in suite.workloads)
        suite = replace(suite, policies=policies, workloads=workloads)
    changes = {name: getattr(args, name) for name in SWEEP_OPTIONS}
    if changes := {name: value for name, value in changes.items() if value is not None}:
        (workload,) = suite.workloads
        kept = {name: getattr(workload, name) for name in (*SWEEP_OPTIONS[:-1], *SWEEP_KEEPS)}
        kept["waves"] = workload.num_requests // workload.concurrency
        suite = replace(suite, workloads=(sweep(**(kept | changes)),))
    return suite


def run_suite(suite: Suite, args: argparse.Namespace, clock: Clock) -> tuple[int, str]:
    """Run what is asked for.

    Returns:
        0, 1 if a run does not count, or ``OUT_OF_TIME``; and what is left to do.
    """
    good = True
    for workload in suite.workloads:
        if args.workloads and workload.name not in args.workloads:
            continue
        chosen = args.policies or workload.policies
        policies = [policy for policy in suite.policies if not chosen or policy.name in chosen]
        try:
            good &= Benchmark(args.suite, suite, workload, policies, args, clock).run()
        except OutOfTimeError as error:
            return OUT_OF_TIME, f"OUT OF TIME ({error}): the same command goes on"
        except (CheckFailedError, ValueError) as error:
            return 1, f"FAILED: {error}"
    return int(not good), "all runs are there"


def main() -> int:
    args = parse_arguments()
    # Importing vLLM counts.
    start = time.monotonic() - (time.time() - psutil.Process().create_time())
    suite = chosen_suite(args)
    console = Console(soft_wrap=True, markup=False)
    with tempfile.TemporaryDirectory() as directory:
        args.output = args.output or (Path(directory) if suite.smoke else RESULTS)
        code, state = 0, "all runs are there"
        if not args.report_only:
            code, state = run_suite(suite, args, Clock(args.minutes, start))
        console.print(report.write(args.output, args.suite))
        console.print(f"{state}; raw results, report and plots are in {args.output}")
    return code


if __name__ == "__main__":
    sys.exit(main())
