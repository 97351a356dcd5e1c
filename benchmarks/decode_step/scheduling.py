"""What the scheduler takes of a decode step, by the number of running requests and by admission.

    python -m benchmarks.decode_step.scheduling [--running 256 1024 4096] [--output FILE.json]

vLLM's scheduler runs alone, with a worker that returns a token for every request. With ``reserve``
and ``expected`` the pool has room for exactly the running requests, and one more waits, so that
every step asks whether it may come in. With the full cache one waits as well, but all places for
sequences are taken, and nothing is asked. With ``optimistic`` it comes in at once.

A shared machine is faster in one minute than in the next: all caches are measured in turn, in
several rounds, and the fastest round of each counts.
"""

import argparse
import json
import statistics
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.common import paths
from benchmarks.common.lone_scheduler import BLOCK_SIZE, LoneScheduler, state_blocks
from benchmarks.common.provenance import provenance
from vase_vllm.config import EvictionConfig
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.markdown import table

BUDGET, WINDOW, PROMPT_LEN, MAX_MODEL_LEN = 512, 64, 16, 8192
CACHES = ("full", "reserve", "expected", "optimistic")
RESULTS = paths.RESULTS / "decode_step" / "scheduling.json"


def measure(cache: str, num_running: int, num_steps: int) -> dict[str, Any]:
    """The median and the longest of some decode steps before any sequence evicts."""
    settings = {"budget": BUDGET, "window": WINDOW}
    config = EvictionConfig.parse(settings)
    evicting = None if cache == "full" else config.changed(admission=cache)
    of_each = cdiv(config.schedule.bound, BLOCK_SIZE) + state_blocks(config)
    engine = LoneScheduler(
        evicting,
        num_running * of_each,
        max_num_seqs=num_running + (evicting is not None),
        max_num_batched_tokens=max(2048, num_running * PROMPT_LEN),
        max_model_len=MAX_MODEL_LEN,
    )
    for number in range(num_running + 1):
        engine.add(str(number), [number % 1000 + 10] * PROMPT_LEN, MAX_MODEL_LEN - PROMPT_LEN)

    def step() -> float:
        start = time.perf_counter()
        engine.step()
        return 1e3 * (time.perf_counter() - start)

    for _ in range(3):
        step()
    description = f"{cache}, {num_running} requests"
    times = [step() for _ in track(range(num_steps), description, transient=True)]
    running = len(engine.scheduler.running)
    if cache in ("reserve", "expected", "full") and running != num_running:
        raise RuntimeError(f"{description}: {running} run")
    return {
        "cache": cache,
        "running": running,
        "median_ms": round(statistics.median(times), 3),
        "longest_ms": round(max(times), 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = []
    for num_running in args.running:
        rounds = [
            [measure(cache, num_running, args.steps) for cache in args.caches]
            for _ in range(args.rounds)
        ]
        rows += [
            min(of_cache, key=itemgetter("median_ms")) for of_cache in zip(*rounds, strict=True)
        ]
    settings = {"budget": BUDGET, "window": WINDOW, "rounds": args.rounds}
    result = {**provenance(), **settings, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    cells = [[str(value) for value in row.values()] for row in rows]
    heads = ["cache", "requests running", "ms a step, median", "ms a step, longest"]
    Console(soft_wrap=True).print("\n".join(table(heads, cells)), markup=False)


if __name__ == "__main__":
    main()
