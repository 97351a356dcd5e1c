"""Many requests of all kinds against a small pool: nothing is lost, mixed up or left behind.

    python -m benchmarks.stress.run --minutes 20

See README.md in this folder for what is sent and what is checked.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import paths
from benchmarks.common.provenance import provenance
from benchmarks.common.server import ERROR, blocks_left, running_server
from benchmarks.stress.client import Case, Outcome, make_cases, press
from vase_vllm.tools.markdown import table
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

ARGUMENTS = [
    *["--enforce-eager", "--max-model-len", "2048", "--block-size", "32", "--dtype", "float32"],
    *["--max-num-seqs", "32", "--scheduling-policy", "priority", "--served-model-name", "stress"],
    *["--kv-eviction", "vase", "--kv-eviction-config.budget", "128"],
    *["--kv-eviction-config.window", "16", "--kv-eviction-config.admission", "optimistic"],
]
REJECTION = "Exception caught. Request id"
"""What vLLM logs as an error when it answers HTTP 400."""
COUNTERS = ("vllm:num_preemptions", "vllm:kv_eviction_evictions", "vllm:prefix_cache_hits")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--requests", type=int, default=1000, help="at least, even if it is later")
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--per-kind", type=int, default=5, help="different requests of each kind")
    parser.add_argument("--pool", default="3M", help="memory of the KV cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=paths.RESULTS / "stress", metavar="DIR")
    return parser.parse_args(arguments)


def counters(server: Server) -> dict[str, int]:
    """The server's own counts."""
    metrics = server.metrics()
    return {name: int(metrics[name].samples[0].value) for name in COUNTERS}


def measure(
    server: Server, cases: Sequence[Case], args: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Press a server, and ask it afterwards what is left."""
    task = progress.add_task("", total=None)
    before, start = counters(server), time.monotonic()
    deadline = start + 60 * args.minutes

    def goes_on(sent: int) -> bool:
        return sent < args.requests or time.monotonic() < deadline

    def done(count: int) -> None:
        progress.update(task, description=f"{count} requests")

    outcomes = press(server, cases, args.concurrency, args.seed, goes_on, done)
    seconds = time.monotonic() - start
    left = blocks_left(server)
    after = counters(server)
    return {
        **provenance(),
        "concurrency": args.concurrency,
        "seconds": round(seconds, 1),
        "counters": {name: after[name] - before[name] for name in COUNTERS},
        "blocks_left": left,
        "errors_in_the_log": [
            line for line in ERROR.findall(server.log()) if REJECTION not in line
        ],
        "kinds": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, once.

    Returns:
        What came of it, for JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", layers=2, dtype="float32")
        arguments = [*ARGUMENTS, "--kv-cache-memory-bytes", args.pool]
        with running_server(model, arguments) as server, progress_bar() as progress:
            progress.add_task("each request alone, then all of them", total=None)
            cases = make_cases(server, args.per_kind, args.seed)
            result = measure(server, cases, args, progress)
        return result | {
            "serve_arguments": arguments,
            "processes_left": len(server.processes()),
        }


def progress_bar() -> Progress:
    """What is shown meanwhile."""
    return Progress(TextColumn("{task.description}"), TimeElapsedColumn(), transient=True)


def is_good(result: dict[str, Any]) -> bool:
    """Whether nothing was lost, mixed up or left behind, and the pressure was real."""
    failed = sum(Outcome(**kind).failed for kind in result["kinds"].values())
    left = result["blocks_left"] + result["processes_left"] + len(result["errors_in_the_log"])
    pressed = min(result["counters"][name] for name in COUNTERS[:2])
    return failed == left == 0 < pressed


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    kinds = {name: Outcome(**kind) for name, kind in result["kinds"].items()}
    rows = [
        [
            name,
            str(kind.sent),
            str(kind.tokens),
            f"{sorted(kind.seconds)[len(kind.seconds) // 2]:.1f}" if kind.seconds else "–",
            f"{max(kind.seconds):.1f}" if kind.seconds else "–",
            str(kind.wrong_status),
            str(kind.different),
            str(kind.unanswered),
        ]
        for name, kind in kinds.items()
    ]
    heads = ["kind", "sent", "output tokens", "median s", "longest s"]
    heads += ["wrong status", "other output than alone", "unanswered"]
    total = sum(kind.sent for kind in kinds.values())
    machine, counts = result["machine"], result["counters"]
    return "\n".join(
        [
            "# Requests of all kinds against a small pool",
            "",
            f"{result['date'][:10]}, {machine['processor']}, {machine['cores']} cores; "
            f"`{result['command']}`. {total} requests in {result['seconds'] / 60:.1f} minutes, "
            f"{result['concurrency']} at a time: **"
            + ("nothing lost, mixed up or left behind" if is_good(result) else "NOT as it must be")
            + "**.",
            "",
            f"{counts[COUNTERS[0]]} preemptions, {counts[COUNTERS[1]]} evictions, "
            f"{counts[COUNTERS[2]]} prompt tokens from the prefix cache; afterwards "
            f"{result['blocks_left']} blocks in use, {result['processes_left']} processes, "
            f"{len(result['errors_in_the_log'])} errors in the server's log.",
            "",
            *table(heads, rows),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    result = run(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "cpu.md").write_text(page(result))
    Console(soft_wrap=True).print(page(result), markup=False)
    return int(not is_good(result))


if __name__ == "__main__":
    sys.exit(main())
