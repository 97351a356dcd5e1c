"""The worked numbers of docs/scaling.md: predictions for Qwen3-8B, nothing measured.

python -m benchmarks.predictions.scaling.predict            # print the tables
python -m benchmarks.predictions.scaling.predict --write    # put them into docs/scaling.md
"""

import argparse
import re
import sys

from benchmarks.common.paths import MODELS, ROOT
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.markdown import table
from vase_vllm.tools.plan.capacity import MEMORY_UTILIZATION, kv_cache_memory
from vase_vllm.tools.plan.cost import Part, Shard, Step, num_blocks_held
from vase_vllm.tools.plan.gpus import GPUS
from vase_vllm.tools.plan.model_shape import read_model_shape

DOCUMENT = ROOT / "docs" / "scaling.md"
MODEL = MODELS / "qwen3-8b"
WINDOW, BLOCK_SIZE, STATE_BLOCKS = 64, 16, 8
LENGTH = 16384
BUDGETS = (2048, 4096, 6144)
CACHES = (
    ("full, 4k", 4096, None),
    ("full, 16k", LENGTH, None),
    ("full, 32k", 32768, None),
    *((f"T = {budget}", LENGTH, EvictionSchedule(budget, WINDOW)) for budget in BUDGETS),
)
BATCHES = (1, 8, 32, 64, 128, 256)
Cache = tuple[str, int, EvictionSchedule | None]


def step(shard: Shard, batch: int, cache: Cache) -> Step:
    """A step whose sequences have the cache's length, or have all evicted."""
    _, length, schedule = cache
    cached = length if schedule is None else schedule.budget + (schedule.window + 1) / 2
    return shard.step(batch, cached, schedule)


def fits(shard: Shard, gpu: str, batch: int, cache: Cache) -> bool:
    """Whether so many sequences of that length are in memory at once."""
    _, length, schedule = cache
    memory = kv_cache_memory(
        int(GPUS[gpu].memory), MEMORY_UTILIZATION, 2 << 30, round(shard.weight_bytes)
    )
    usable = memory // (BLOCK_SIZE * shard.kv_bytes_per_token) - 1
    state_blocks = STATE_BLOCKS if schedule else 0
    return batch * num_blocks_held(length, BLOCK_SIZE, schedule, state_blocks) <= usable


def parts_table(shard: Shard, batch: int = 16) -> list[str]:
    """Bytes and operations of one step, and its time on an H200."""
    machine = GPUS["h200"].machine
    steps = [step(shard, batch, cache) for cache in CACHES]

    def row(label: str, values: list[float], digits: int = 1) -> list[str]:
        return [label, *(f"{value:,.{digits}f}" for value in values)]

    def times(pick: str) -> list[float]:
        parts: list[Part] = [getattr(each, pick) for each in steps]
        return [part.seconds(machine) * 1e3 for part in parts]

    seconds = [each.seconds(machine) for each in steps]
    rows = [
        row("weights, GB", [each.linear.num_bytes / 1e9 for each in steps]),
        row("KV cache, GB", [each.attention.num_bytes / 1e9 for each in steps]),
        row("eviction, GB", [each.eviction.num_bytes / 1e9 for each in steps], 2),
        row("linear, TFLOP", [each.linear.operations / 1e12 for each in steps], 2),
        row("attention, TFLOP", [each.attention.operations / 1e12 for each in steps], 2),
        row("eviction, TFLOP", [each.eviction.operations / 1e12 for each in steps], 2),
        row("linear, ms", times("linear")),
        row("attention, ms", times("attention")),
        row("eviction, ms", times("eviction"), 2),
        row("step, ms", [each * 1e3 for each in seconds]),
        row("tokens/s", [batch / each for each in seconds], 0),
    ]
    return table([f"batch {batch} on an H200", *(name for name, *_ in CACHES)], rows)


def milliseconds(shard: Shard, gpu: str, batch: int, cache: Cache) -> str:
    """Of a step; a dash where the memory is too small."""
    if not fits(shard, gpu, batch, cache):
        return "-"
    return f"{step(shard, batch, cache).seconds(GPUS[gpu].machine) * 1e3:.1f}"


def batch_table(shard: Shard, gpu: str) -> list[str]:
    """Milliseconds of a step against the batch."""
    rows = [[c[0], *(milliseconds(shard, gpu, batch, c) for batch in BATCHES)] for c in CACHES]
    return table([f"ms per step, {gpu.upper()}", *(f"B = {batch}" for batch in BATCHES)], rows)


def tensor_parallel_table(shard: Shard, batch: int = 64) -> list[str]:
    """Milliseconds of a step against the number of GPUs."""
    shards = [Shard(shard.model, degree) for degree in (1, 2, 4, 8)]
    rows = [[c[0], *(milliseconds(part, "h200", batch, c) for part in shards)] for c in CACHES]
    names = [f"TP = {part.tensor_parallel_size}" for part in shards]
    return table([f"ms per step, H200s, B = {batch}", *names], rows)


def tables() -> dict[str, str]:
    """The tables by the name of their place in the document."""
    shard = Shard(read_model_shape(str(MODEL))[0])
    lines = {
        "parts": parts_table(shard),
        "h200": batch_table(shard, "h200"),
        "h100": batch_table(shard, "h100"),
        "tp": tensor_parallel_table(shard),
    }
    return {name: "\n".join(own) for name, own in lines.items()}


def fill(text: str) -> str:
    """The document with its tables made anew."""
    for name, content in tables().items():
        mark, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(end)}", re.DOTALL)
        text, number = pattern.subn(f"{mark}\n\n{content}\n\n{end}", text)
        if number != 1:
            raise ValueError(f"{DOCUMENT.name} must have one place for the table {name}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(fill(DOCUMENT.read_text()))
    else:
        print("\n\n".join(tables().values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
