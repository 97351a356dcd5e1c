"""What the scheduler takes of a decode step, by the number of running requests and by admission.

    python -m benchmarks.decode_step.scheduling [--running 256 1024 4096] [--output FILE.json]

vLLM's scheduler runs alone, with a worker that returns a token for every request. With ``reserve``
and ``expected`` the pool has room for exactly the running requests, and one more waits, so that
every step asks whether it may come in. With the full cache one waits as well, but all places for
sequences are taken, and nothing is asked. With ``optimistic`` it comes in at once.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.common import paths
from benchmarks.common.provenance import provenance
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.tools.markdown import table

MODEL = paths.MODELS / "qwen3-8b"
BLOCK_SIZE, BUDGET, WINDOW, PROMPT_LEN, MAX_MODEL_LEN = 16, 512, 64, 16, 8192
CACHES = ("full", "reserve", "expected", "optimistic")
RESULTS = paths.RESULTS / "decode_step" / "scheduling.json"


def make_scheduler(cache: str, num_running: int) -> Scheduler:
    """The scheduler that an engine gets, for one group of layers of Qwen3-8B."""
    eviction = {"budget": BUDGET, "window": WINDOW, "admission": cache}
    evicts = cache != "full"
    arguments = EngineArgs(
        str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=max(2048, num_running * PROMPT_LEN),
        max_num_seqs=num_running + evicts,
        additional_config={"kv_eviction": eviction} if evicts else {},
    )
    config = arguments.create_engine_config()
    shape = {"block_size": BLOCK_SIZE, "num_kv_heads": 8, "head_size": 128}
    shape["dtype"] = config.model_config.dtype
    spec: FullAttentionSpec = FullAttentionSpec(**shape)
    ring = RingLayout(WINDOW, 4, BLOCK_SIZE)
    schedule = EvictionConfig.parse(eviction).schedule if evicts else None
    if schedule is not None:
        spec = EvictionSpec(**shape, schedule=schedule, num_state_blocks=ring.num_blocks)
    of_each = cdiv(BUDGET + WINDOW, BLOCK_SIZE) + ring.num_blocks
    num_blocks = 1 + num_running * of_each
    config.cache_config.num_gpu_blocks = num_blocks
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


def step(scheduler: Scheduler) -> float:
    """Milliseconds of one step."""
    start = time.perf_counter()
    output = scheduler.schedule()
    ids = list(output.num_scheduled_tokens)
    sampled = [[7]] * len(ids)
    index = {request_id: number for number, request_id in enumerate(ids)}
    scheduler.update_from_output(output, ModelRunnerOutput(ids, index, sampled))
    return 1e3 * (time.perf_counter() - start)


def measure(cache: str, num_running: int, num_steps: int) -> dict[str, Any]:
    """The median and the longest of some decode steps before any sequence evicts."""
    scheduler = make_scheduler(cache, num_running)
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
    for number in range(num_running + 1):
        parameters = SamplingParams(max_tokens=MAX_MODEL_LEN - PROMPT_LEN, ignore_eos=True)
        parameters.update_from_generation_config({}, None)
        prompt = [number % 1000 + 2] * PROMPT_LEN
        scheduler.add_request(Request(str(number), prompt, parameters, None, block_hasher=hasher))
    for _ in range(3):
        step(scheduler)
    description = f"{cache}, {num_running} requests"
    times = [step(scheduler) for _ in track(range(num_steps), description, transient=True)]
    if cache in ("reserve", "expected", "full") and len(scheduler.running) != num_running:
        raise RuntimeError(f"{description}: {len(scheduler.running)} run")
    return {
        "cache": cache,
        "running": len(scheduler.running),
        "median_ms": round(statistics.median(times), 3),
        "longest_ms": round(max(times), 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = [measure(cache, n, args.steps) for n in args.running for cache in args.caches]
    result = {**provenance(), "budget": BUDGET, "window": WINDOW, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    cells = [[str(value) for value in row.values()] for row in rows]
    heads = ["cache", "requests running", "ms a step, median", "ms a step, longest"]
    Console(soft_wrap=True).print("\n".join(table(heads, cells)), markup=False)


if __name__ == "__main__":
    main()
