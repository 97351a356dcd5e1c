"""Accuracy of every eviction method against the full cache, on real servers.

    python -m benchmarks.accuracy.run [--policies NAME ...] [--compressions 2 4 8] [--seeds N]

Needs lm-evaluation-harness: pip install ".[accuracy]". README.md in this folder says what is
measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.accuracy import report
from benchmarks.accuracy.evaluation import (
    CLIENT_ENVIRONMENT,
    ENVIRONMENT,
    MODEL,
    TASK,
    Configuration,
    evaluate,
    prepare_client,
)
from benchmarks.accuracy.methods import COMPRESSIONS, METHODS, WINDOW, budget_for, mean_length
from benchmarks.accuracy.tasks import HELD_OUT_FILE, read_jsonl
from benchmarks.common import paths
from benchmarks.common.provenance import provenance

RESULTS = paths.RESULTS / "accuracy"
MOST_TOKENS = 1024
"""``max_gen_toks`` of walks.yaml."""


def configurations(args: argparse.Namespace, length: float) -> list[Configuration]:
    """What is asked for, the full cache first; what draws nothing has one seed."""
    chosen = []
    for method in METHODS:
        if method.name not in args.policies:
            continue
        seeds = range(args.seeds if method.draws else 1)
        if method.policy is None:
            chosen.append(Configuration(method, None, None, 0))
            continue
        for compression in args.compressions:
            budget = budget_for(compression, length)
            if not method.fits(budget):
                continue
            chosen += [Configuration(method, compression, budget, seed) for seed in seeds]
    return chosen


def session(args: argparse.Namespace) -> dict[str, Any]:
    """Where the runs of this command come from."""
    return {
        **provenance(("vllm", "torch", "transformers", "lm_eval", "vase-vllm")),
        "environment": ENVIRONMENT,
        "workers": args.workers,
    }


def run_key(run: dict[str, Any]) -> tuple[str, int | None, int]:
    return run["method"], run["compression"], run["seed"]


def measure(args: argparse.Namespace, result: dict[str, Any], path: Path) -> bool:
    """Every configuration that ``result`` lacks, ``--workers`` at a time; written as they come.

    Returns:
        Whether all runs count.
    """
    there = {run_key(run) for run in result["runs"] if run["status"] == "ok"}
    wanted = configurations(args, result["mean_length"])
    todo = [configuration for configuration in wanted if configuration.key not in there]
    number = len(result["sessions"])
    result["sessions"].append(session(args))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    fresh = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, transient=True) as progress,
        ProcessPoolExecutor(args.workers, fresh, initializer=prepare_client) as clients,
        ThreadPoolExecutor(args.workers) as servers,
    ):
        overall = progress.add_task("configurations", total=len(todo), state="")

        def run_one(configuration: Configuration) -> dict[str, Any]:
            task = progress.add_task(str(configuration), total=result["problems"], state="")
            run = evaluate(
                configuration,
                result["problems"],
                MOST_TOKENS,
                clients,
                lambda state, done: progress.update(task, completed=done, state=state),
            )
            progress.remove_task(task)
            progress.advance(overall)
            outcome = run.get("reason", "")
            if run["status"] == "ok":
                outcome = f"questions right {report.mean(run, report.MAIN):.1%}, {run['seconds']} s"
            progress.console.print(f"{configuration}: {run['status']} {outcome}", markup=False)
            return {"session": number, **run}

        for run in servers.map(run_one, todo):
            result["runs"] = [r for r in result["runs"] if run_key(r) != run_key(run)] + [run]
            path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    keys = {configuration.key for configuration in wanted}
    return all(run["status"] == "ok" for run in result["runs"] if run_key(run) in keys)


def parse_arguments() -> argparse.Namespace:
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--compressions", nargs="+", type=int, default=list(COMPRESSIONS))
    parser.add_argument("--seeds", type=int, default=3, help="of the methods that draw")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--workers", type=int, default=2, help="servers at a time, a core each")
    parser.add_argument(
        "--append", action="store_true", help="keep the results that are there, run what lacks"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report-only", action="store_true", help="from results already there")
    args = parser.parse_args()
    if min(args.seeds, args.workers, *args.compressions, args.limit or 1) < 1:
        parser.error("--seeds, --workers, --compressions and --limit: give numbers from 1 on")
    if not args.report_only and find_spec("lm_eval") is None:
        parser.error('lm-evaluation-harness is missing: pip install ".[accuracy]"')
    return args


def main() -> int:
    args = parse_arguments()
    path = args.output / "accuracy.json"
    good = True
    if not args.report_only:
        os.environ.update(ENVIRONMENT | CLIENT_ENVIRONMENT)
        # Its servers run in threads, in which a server does not handle signals by itself.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        held_out = read_jsonl(HELD_OUT_FILE)
        result: dict[str, Any] = {
            "task": TASK,
            "model": MODEL.name,
            "problems": len(held_out[: args.limit]),
            "mean_length": mean_length(held_out),
            "window": WINDOW,
            "sessions": [],
            "runs": [],
        }
        if args.append and path.exists():
            earlier = json.loads(path.read_text())
            if earlier["problems"] != result["problems"]:
                print(
                    f"--append: {path} has {earlier['problems']} problems a run: "
                    f"give --limit {earlier['problems']}, or another --output",
                    file=sys.stderr,
                )
                return 2
            result = earlier
        args.output.mkdir(parents=True, exist_ok=True)
        good = measure(args, result, path)
    if not path.exists():
        print(f"--report-only: there is no {path}: run without it first", file=sys.stderr)
        return 2
    console = Console()
    console.print(report.write(args.output), markup=False, soft_wrap=True)
    console.print(
        f"Raw results, report and plots are in {args.output}", markup=False, soft_wrap=True
    )
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
