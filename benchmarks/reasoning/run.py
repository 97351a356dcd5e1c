"""Accuracy on AIME, HMMT, GPQA-Diamond and MATH-500 with real weights, under eviction and without.

    python -m benchmarks.reasoning.run --model Qwen/Qwen3-8B --tasks aime25 math500 \\
        --policies full vase rkv --seeds 4

Run again, it goes on where it stopped. docs/accuracy.md says how to read it and what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import paths
from benchmarks.common.environment import KEEP_ALIVE
from benchmarks.common.policy import Policy
from benchmarks.common.server import evictions_so_far, running_server
from benchmarks.reasoning import report
from benchmarks.reasoning.harness import Request, RunFailedError, cache, command, evaluate
from benchmarks.reasoning.suite import FULL, TASKS, directory_name, plan
from vase_vllm.tools.server import Server

RESULTS = paths.RESULTS / "reasoning"
PACKAGES = ("lm-eval", "math-verify")
START_SECONDS = 2 * 3600  # the weights may have to be downloaded first
WITHOUT_TRUNCATION = {"top_k": -1, "min_p": 0.0}
"""Said in every request, because a server takes what a request does not say from the model."""


def papers_sampling(model: str) -> dict[str, float]:
    """As in VaSE's paper: the model's own temperature and top-p, 1 where it has none; no top-k.

    Raises:
        ValueError: the model has no such file.
    """
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:
        raise ValueError(f"{model} has no generation_config.json: give --sampling") from None
    own = {key: getattr(config, key, None) or 1.0 for key in ("temperature", "top_p")}
    return own | WITHOUT_TRUNCATION


@contextmanager
def serving(policy: Policy, args: argparse.Namespace) -> Iterator[tuple[str, Server | None]]:
    """The URL of a server with this policy, and the server if it is ours.

    Raises:
        RunFailedError: it does not start; its output is kept beside the results.
    """
    if args.base_url:
        yield args.base_url.rstrip("/").removesuffix("/v1"), None
        return
    arguments = [*policy.serve_arguments(), "--max-model-len", str(args.max_model_len)]
    arguments += [*shlex.split(args.serve_arguments), "--served-model-name", args.model]
    name = directory_name(policy)
    log = args.output / name / "server.log"
    with ExitStack() as stack:
        try:
            server = stack.enter_context(running_server(args.model, arguments, START_SECONDS, log))
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rstrip(":")
            raise RunFailedError(f"{name}: {reason}, see {log}") from None
        yield server.url, server


def count_evictions(server: Server | None) -> int | None:
    """The server's own count; None where there is nothing to count or nobody to ask."""
    return None if server is None else evictions_so_far(server)


def run_policy(
    policy: Policy,
    runs: list[tuple[str, int]],
    request: Request,
    args: argparse.Namespace,
    progress: Progress,
) -> list[str]:
    """Serve with this policy and evaluate; returns what failed, a line each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    failures = []
    bar = progress.add_task(f"{directory_name(policy)}: starting the server", total=None)
    try:
        with serving(policy, args) as (url, server):
            for task, seed in runs:
                name = f"{directory_name(policy)} {task} seed {seed}"
                progress.reset(bar, total=None, description=name)
                directory = args.output / directory_name(policy) / f"{task}-seed{seed}"
                resumed = any(directory.glob(f"{cache(directory).name}*"))
                before, start = count_evictions(server), time.monotonic()

                def show(done: int, total: int) -> None:
                    progress.update(bar, completed=done, total=total)

                try:
                    line = command(request, task, seed, url, directory)
                    answers = evaluate(line, directory, show)
                except RunFailedError as error:
                    failures.append(f"{name}: {error}")
                    continue
                after = count_evictions(server)
                counted = not resumed and before is not None and after is not None
                result = {
                    "task": task,
                    "policy": policy.name,
                    "budget": policy.budget,
                    "seed": seed,
                    "seconds": round(time.monotonic() - start, 1),
                    "evictions": after - before if counted else None,
                    "command": shlex.join(line),
                    "answers": [
                        {
                            "problem": answer.problem,
                            "exact_match": answer.exact_match,
                            "no_answer": answer.no_answer,
                            "tokens": len(tokenizer.encode(answer.text, add_special_tokens=False)),
                        }
                        for answer in answers
                    ],
                }
                (directory / "run.json").write_text(json.dumps(result, indent=1))
    except RunFailedError as error:
        failures.append(str(error))
    progress.remove_task(bar)
    return failures


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Results of other settings do not go into the same table.

    Raises:
        ValueError: ``output`` holds such results.
    """
    path = output / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        other = [key for key in settings if settings[key] != before.get(key)]
        if other:
            raise ValueError(f"{output} has results with another {', '.join(other)}: give --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


def installed() -> dict[str, str]:
    """Versions of what marks the answers.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return {package: version(package) for package in PACKAGES}
    except PackageNotFoundError as error:
        raise ValueError(
            f"{error.name} is missing: run pip install '.[accuracy]' in a checkout of vase-vllm"
        ) from None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="name on the Hub, or directory")
    add(
        *("--tasks", "-t"),
        nargs="+",
        default=list(TASKS),
        help=f"of {', '.join(TASKS)}, or others of lm-evaluation-harness",
    )
    add(
        "--policies",
        nargs="+",
        default=[FULL, "vase"],
        help='"full", or NAME or NAME:KEY=VALUE,... as in vase:sampling=greedy',
    )
    add("--budgets", nargs="+", type=int, help="default: the one recommended for the task")
    add("--seeds", type=int, default=4, help="samples of each problem (default: 4)")
    add("--limit", type=int, help="the first so many problems of each task only")
    add(
        "--max-model-len",
        type=int,
        default=32768,
        help="of the server: longest answer with its prompt (default: 32768)",
    )
    add(
        "--sampling",
        type=json.loads,
        help="JSON; default: temperature and top-p of the model's generation_config.json, no top-k",
    )
    add("--concurrency", type=int, default=64, help="requests at a time (default: 64)")
    add("--base-url", help="a server that runs already; then --policies is only its label")
    add("--serve-arguments", default="", help='further ones of vllm serve: --serve-arguments="..."')
    add("--include-path", type=Path, help="directory of your own lm-evaluation-harness tasks")
    add("--output", type=Path, help=f"default: a directory in {RESULTS}")
    args = parser.parse_args(arguments)
    args.output = args.output or RESULTS / args.model.strip("/").replace("/", "--")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit status: 1 if a run failed, 2 for a wrong setting."""
    args = parse_arguments(arguments)
    console = Console()
    try:
        packages = installed()
        servers = plan(args.policies, args.budgets, args.tasks)
        if args.base_url and len(servers) > 1:
            raise ValueError("--base-url is one server: give one policy and one budget")
        request = Request(
            model=args.model,
            sampling=args.sampling or papers_sampling(args.model),
            # The server ends an answer where its prompt leaves no more room.
            max_tokens=args.max_model_len,
            limit=args.limit,
            concurrency=args.concurrency,
            include_path=args.include_path,
        )
        asked = asdict(request)
        settings = {key: asked[key] for key in ("model", "sampling", "max_tokens", "limit")}
        settings |= {"serve_arguments": args.serve_arguments, "packages": packages}
        check_settings(args.output, settings)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2

    for name, value in KEEP_ALIVE.items():
        os.environ.setdefault(name, value)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    failures = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        overall = progress.add_task("runs", total=len(servers))
        for policy, tasks in servers:
            runs = [(task, seed) for seed in range(args.seeds) for task in tasks]
            results = args.output / directory_name(policy)
            left = [r for r in runs if not (results / f"{r[0]}-seed{r[1]}" / "run.json").exists()]
            if left:
                failures += run_policy(policy, left, request, args, progress)
            progress.advance(overall)
    console.print(report.write(args.output, settings), markup=False, soft_wrap=True)
    for failure in failures:
        console.print(f"error: {failure}", style="red", markup=False, soft_wrap=True)
    console.print(f"Results are in {args.output}", markup=False, soft_wrap=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
