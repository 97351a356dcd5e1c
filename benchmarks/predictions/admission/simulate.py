"""What rules of admission do with traces whose past misleads: vLLM's scheduler, a counted clock.

    python -m benchmarks.predictions.admission.simulate

The scheduler is vLLM's own with our block manager; a step takes as long as its bytes and operations
would on an H100 with Qwen3-8B (vase_vllm/tools/plan). Predictions: nothing here is measured.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.environment import QUIET

os.environ.update({**QUIET, **os.environ})

from rich.console import Console
from rich.progress import track

from benchmarks.common import paths
from benchmarks.common.lone_scheduler import BLOCK_SIZE, MODEL, LoneScheduler, state_blocks
from benchmarks.common.provenance import provenance
from benchmarks.predictions.admission.traces import KINDS, MAX_TOKENS, PROMPT_LEN, make_trace
from vase_vllm.config import EvictionConfig
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.tools.markdown import table
from vase_vllm.tools.plan.cost import Part, Shard
from vase_vllm.tools.plan.gpus import GPUS
from vase_vllm.tools.plan.model_shape import read_model_shape

BUDGET, WINDOW, MAX_NUM_SEQS, STEP_TOKENS = 512, 64, 128, 2048
MEMORY_FOR = 48
"""Sequences under eviction for which there is KV cache memory."""
CACHES = ("full", "reserve", "expected", "optimistic")
RESULTS = paths.RESULTS / "predictions" / "admission"


@dataclass
class Outcome:
    """What became of a trace.

    Attributes:
        seconds: until all requests had ended.
        tokens: of all outputs.
        steps: of the engine.
        preempted: requests that were preempted at least once.
        recomputed: tokens that were computed again.
        most_running: requests at a time.
    """

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    preempted: int = 0
    recomputed: int = 0
    most_running: int = 0


def simulate(cache: str, trace: str, count: int, seed: int) -> Outcome:
    """Serve a trace to its end."""
    config = EvictionConfig.parse({"budget": BUDGET, "window": WINDOW})
    num_blocks = MEMORY_FOR * (cdiv(config.schedule.bound, BLOCK_SIZE) + state_blocks(config))
    engine = LoneScheduler(
        None if cache == "full" else config.changed(admission=cache),
        num_blocks,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=PROMPT_LEN + MAX_TOKENS + 1,
    )
    scheduler = engine.scheduler
    shard, machine = Shard(read_model_shape(str(MODEL))[0]), GPUS["h100"].machine
    arrivals = make_trace(trace, count, seed)
    waiting = list(enumerate(arrivals))[::-1]
    preempted: set[str] = set()
    found = Outcome(tokens=sum(arrival.output_len for arrival in arrivals))
    computed = 0
    while waiting or scheduler.has_requests():
        while waiting and waiting[-1][1].seconds <= found.seconds:
            number, arrival = waiting.pop()
            prompt = [10 + (number + index * index) % 1000 for index in range(PROMPT_LEN)]
            engine.add(str(number), prompt, MAX_TOKENS, arrival.output_len)
        if not scheduler.has_requests():
            found.seconds = waiting[-1][1].seconds
            continue
        output = engine.step()
        preempted |= output.preempted_req_ids or set()
        num_tokens = output.total_num_scheduled_tokens
        computed += num_tokens
        pool = scheduler.kv_cache_manager.block_pool
        num_cached = (num_blocks - pool.get_num_free_blocks()) * BLOCK_SIZE
        step = Part(
            shard.weight_bytes + num_cached * shard.kv_bytes_per_token,
            shard.weight_bytes * num_tokens,
        )
        found.seconds += machine.overhead + step.seconds(machine)
        found.steps += 1
        found.most_running = max(found.most_running, len(scheduler.running))
    found.preempted = len(preempted)
    # The last token of an output is never computed.
    found.recomputed = computed - sum(PROMPT_LEN + a.output_len - 1 for a in arrivals)
    return found


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    of_full = (row for row in results["rows"] if row["cache"] == "full")
    full = {row["trace"]: row["tokens"] / row["seconds"] for row in of_full}
    cells = []
    for row in results["rows"]:
        speed = row["tokens"] / row["seconds"]
        cells.append(
            [
                row["trace"],
                row["cache"],
                f"{speed:.0f}",
                f"{speed / full[row['trace']]:.2f}",
                f"{row['preempted'] / results['requests']:.1%}",
                f"{row['recomputed'] / row['tokens']:.1%}",
                str(row["most_running"]),
            ]
        )
    heads = ["trace", "cache", "tokens/s", "of full", "requests preempted"]
    heads += ["tokens recomputed, of the outputs'", "most running"]
    lines = [
        "# Rules of admission on traces whose past misleads",
        "",
        f"- command: `{results['command']}`",
        f"- date: {results['date']}",
        "",
        "vLLM's own scheduler and our block manager; the clock is the cost model's of an H100 with",
        f"Qwen3-8B: speeds are predictions. {results['requests']} requests that are all told",
        f"{MAX_TOKENS} tokens, budget {BUDGET}, memory for {MEMORY_FOR} sequences under eviction,",
        f"at most {MAX_NUM_SEQS} at a time.",
        "",
        *table(heads, cells),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    runs = [(trace, cache) for trace in args.traces for cache in CACHES]
    rows: list[dict[str, Any]] = []
    results = {**provenance(), "requests": args.requests, "seed": args.seed, "rows": rows}
    args.output.mkdir(parents=True, exist_ok=True)
    for trace, cache in track(runs, "traces", console=Console(stderr=True)):
        outcome = simulate(cache, trace, args.requests, args.seed)
        rows.append({"trace": trace, "cache": cache} | asdict(outcome))
        (args.output / "admission.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "admission.md").write_text(page(results))
    Console(soft_wrap=True).print(page(results), markup=False)


if __name__ == "__main__":
    main()
